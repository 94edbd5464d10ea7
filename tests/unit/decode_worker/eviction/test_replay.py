"""A sequence that evicts goes on where another worker was lost: what it dropped depended on every step, so all come."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from decode_worker.worker import LoadedModel
from tests.unit.decode_worker.eviction.shipments import RuledShipment
from tests.unit.decode_worker.eviction.test_worker import KEPT, KINDS, PROMPT, SAMPLING, STEPS, tokens_of
from tests.unit.decode_worker.failover import Watched, replayed
from tests.unit.decode_worker.sequences import prefill, text_ids
from tests.unit.decode_worker.serving import Served, TokenStream, frames, run
from tests.unit.decode_worker.test_preemption import STORAGES, preemptions
from tests.unit.decode_worker.tiny import load_whole

CUTS = (2, 7, 23, STEPS)


@pytest.fixture(scope="module")
def shipments(checkpoint: Path) -> dict[str, RuledShipment]:
    prompt = prefill(load_whole(checkpoint), text_ids(3, PROMPT))
    return {kind: RuledShipment(prompt, KEPT, eviction) for kind, eviction in KINDS.items()}


async def go_on(
    served: Served, loaded: LoadedModel, shipment: RuledShipment, stream: TokenStream, handle: int, delivered: list[int]
) -> None:
    promise = await served.reserve(
        request_id=str(handle), max_new_tokens=STEPS + 1, kept_tokens_bound=40, delivered_tokens=len(delivered)
    )
    compatibility = loaded.identity.compatibility
    manifest = shipment.manifest(str(handle), compatibility=compatibility, sampling=SAMPLING)
    await served.put(frames(promise.token, manifest, shipment.body))
    await stream.attach(handle, promise.token, delivered)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "nothing"])
def test_every_kind_goes_on_as_if_nothing_had_happened(
    loaded: LoadedModel, shipments: dict[str, RuledShipment], kind: str, storage: str
) -> None:
    """Beside one that keeps everything, whose tokens come in one pass."""
    shipment, plain, watched = shipments[kind], shipments["nothing"], Watched()

    async def body(served: Served) -> None:
        stream = served.stream()
        answer, other = ([each.prompt.first_token, *tokens_of(loaded, each)] for each in (shipment, plain))
        assert len(set(answer)) > 5, "an answer that says something"
        for cut in CUTS:
            await go_on(served, loaded, shipment, stream, cut, answer[:cut])
        await go_on(served, loaded, plain, stream, 99, other[:30])
        for cut in CUTS:
            assert await stream.tokens(cut) == answer[cut:]
        assert await stream.tokens(99) == other[30:]
        await served.nothing_is_held()
        assert watched.replays == [29]
        assert replayed(served) == (sum(CUTS) - len(CUTS) + 29, len(CUTS) + 1)

    run(loaded, body, build=watched.build(STORAGES[storage]))


@pytest.mark.parametrize("storage", STORAGES)
def test_parked_in_the_middle(loaded: LoadedModel, shipments: dict[str, RuledShipment], storage: str) -> None:
    """Little is promised and nothing announced: they leave in the middle of what is known, and come back."""

    async def body(served: Served) -> None:
        stream = served.stream()
        answers = [[each.prompt.first_token, *tokens_of(loaded, each)] for each in shipments.values()]

        async def ask(number: int, shipment: RuledShipment) -> None:
            promise = await served.reserve(request_id=str(number), max_new_tokens=STEPS + 1, kept_tokens_bound=40)
            compatibility = loaded.identity.compatibility
            manifest = shipment.manifest(str(number), compatibility=compatibility, sampling=SAMPLING)
            await served.put(frames(promise.token, manifest, shipment.body))
            await stream.attach(number, promise.token, answers[number][:25])

        await asyncio.gather(*(ask(number, shipment) for number, shipment in enumerate(shipments.values())))
        for number, answer in enumerate(answers):
            assert await stream.tokens(number) == answer[25:]
        assert preemptions(served)["outgrown"] > 2
        await served.nothing_is_held()

    run(loaded, body, build=STORAGES[storage], promised_tokens=3)
