"""A decode worker goes on with an answer of a given form, also in the middle, and believes no manifest."""

from __future__ import annotations

import re

import pytest
from vlcache.v1 import inference_pb2 as public

from decode_worker.answers import Stage
from decode_worker.worker import LoadedModel
from shared.errors import InvalidRequestError
from shared.model.sampler import Drawn
from shared.request.constraint import Constraint
from shared.request.sampling import Sampling
from tests.unit.decode_worker.serving import Served, failure, frames, run
from tests.unit.decode_worker.shipment import Shipment
from tests.unit.decode_worker.stepping import running, sequence, stepped

PATTERN = "a([0-9]{2}[a-z]){6}"


def formed(pattern: str, tokens: int = 30) -> Sampling:
    return Sampling(max_new_tokens=tokens, temperature=1.5, seed=3, constraint=Constraint("regex", pattern))


def test_a_stream_that_goes_on_elsewhere_is_the_same_stream(loaded: LoadedModel, shipment: Shipment) -> None:
    first = loaded.tokenizer.encode("a", add_special_tokens=False)
    answer = {"sampling": formed(PATTERN), "generated": tuple(first)}

    async def body(served: Served) -> None:
        stream, whole = served.stream(), list[int]()
        for handle, known in enumerate((1, 4, 9)):
            promise = await served.reserve(request_id=f"r{handle}", max_new_tokens=30, delivered_tokens=known)
            manifest = shipment.manifest(f"r{handle}", **answer)
            await served.put(frames(promise.token, manifest, shipment.body))
            await stream.attach(handle, promise.token, delivered=[*first, *whole][:known] if whole else ())
            told = await stream.tokens(handle)
            assert stream.updates(handle)[-1].finish_reason == public.FINISH_REASON_STOP
            whole = whole or told
            assert told == whole[known - 1 :]
        assert re.fullmatch(PATTERN, loaded.tokenizer.decode([*first, *whole], skip_special_tokens=True))
        await served.nothing_is_held()

    run(loaded, body)


ENDLESS = "start: r0\n" + "".join(f"r{n}: r{n + 1}\n" for n in range(4000)) + 'r4000: "a"'
BAD = [Constraint("regex", "("), Constraint("regex", "[0-9]+"), Constraint("grammar", ENDLESS)]


@pytest.mark.parametrize("bad", BAD, ids=["none", "contradicted", "too much"])
def test_a_manifest_with_a_bad_constraint_is_refused_and_may_be_sent_again(
    loaded: LoadedModel, shipment: Shipment, bad: Constraint
) -> None:
    """One that is none, one that its own first token breaks, and one that is too much."""
    first = loaded.tokenizer.encode("a", add_special_tokens=False)

    async def body(served: Served) -> None:
        promise = await served.reserve(max_new_tokens=30)
        lie = shipment.manifest(sampling=Sampling(max_new_tokens=30, constraint=bad), generated=tuple(first))
        error = await failure(served.put(frames(promise.token, lie, shipment.body)))
        assert (error.code, error.reason) == ("INVALID_ARGUMENT", "CONSTRAINT")
        assert served.held.find(promise.token).stage is Stage.RESERVED
        good = shipment.manifest(sampling=formed(PATTERN), generated=tuple(first))
        await served.put(frames(promise.token, good, shipment.body))
        stream = served.stream()
        await stream.attach(1, promise.token)
        assert len(await stream.tokens(1)) > 1
        await served.nothing_is_held()

    run(loaded, body)


def test_tokens_that_cannot_have_been_delivered_end_that_answer_alone(loaded: LoadedModel, shipment: Shipment) -> None:
    first = loaded.tokenizer.encode("a", add_special_tokens=False)
    answer = {"sampling": formed(PATTERN), "generated": tuple(first)}

    async def body(served: Served) -> None:
        stream = served.stream()
        for handle, delivered in enumerate(([], [*first, *first])):
            promise = await served.reserve(request_id=f"r{handle}", max_new_tokens=30, delivered_tokens=len(delivered))
            manifest = shipment.manifest(f"r{handle}", **answer)
            await served.put(frames(promise.token, manifest, shipment.body))
            await stream.attach(handle, promise.token, delivered=delivered)
        assert (await stream.finished(0))[-1].finish_reason == public.FINISH_REASON_STOP
        assert (await stream.finished(1))[-1].error.reason == "CONSTRAINT"
        await served.nothing_is_held()

    run(loaded, body)


def test_who_has_nothing_left_to_say_leaves_and_the_others_go_on() -> None:
    refusal = InvalidRequestError("nothing follows", reason="CONSTRAINT")
    with running() as it:
        stuck, other = sequence(), sequence()
        it.engine.answers[stuck] = [1, Drawn(token=0, refusal=refusal)]
        it.scheduler.join(stuck)
        it.in_step()
        it.scheduler.join(other)
        it.step()
        outcome = it.step()
        assert (stepped(outcome), outcome.refused) == ([other], [(stuck, refusal)])
        assert not outcome.failed
        assert not outcome.outgrown
        assert stepped(it.step()) == [other]
