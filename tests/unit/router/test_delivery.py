"""What a client gets when its answer is begun again and again."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlcache.v1 import inference_pb2 as pb
from vlcache.worker.v1 import decode_pb2, prefill_pb2

from router.accounting import Accounting
from router.requests.delivery import Delivery
from shared.errors import InternalError
from shared.request.params import Budget
from shared.telemetry.metrics import RouterMetrics


def delivery(n: int = 1) -> Delivery:
    account = Accounting(RouterMetrics(worker="router")).open()
    return Delivery(account, Budget.from_proto(pb.CompressionParams(), default_retention=float(Fraction(1, 10))), n)


# an answer, and runs of it: how many tokens the prefill worker says, how many come in all before the run is lost
ANSWERS = st.lists(st.integers(0, 9), min_size=1, max_size=20)
RUNS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 20), st.integers(1, 3)), max_size=6)


@given(answer=ANSWERS, runs=RUNS)
def test_every_token_and_report_arrives_exactly_once(answer: list[int], runs: list[tuple[int, int, int]]) -> None:
    seen = delivery()
    events: list[pb.GenerateResponse] = []
    for ahead, until, at_once in [*runs, (1, len(answer), 1)]:
        seen.rewind()
        # it draws what was delivered again, and never less than one token
        said = answer[: min(ahead, len(answer))]
        cut = max(until, len(seen.answers[0].token_ids))
        for number, token in enumerate(said[: max(1, cut)]):
            event = prefill_pb2.FirstToken(token_id=token, text=str(token), prompt_tokens=5, visual_tokens=4)
            later = prefill_pb2.NextToken(token_id=token, text=str(token))
            events += seen.on_first_token(event) if number == 0 else seen.on_token(later)
        if cut < len(said):
            continue
        events += seen.on_compression(pb.Compression(prompt_tokens=5, visual_tokens=4))
        events += seen.on_transfer(pb.Transfer(sent_bytes=1))
        for start in range(len(seen.answers[0].token_ids), min(cut, len(answer)), at_once):
            tokens = answer[start : start + at_once]
            update = decode_pb2.SequenceUpdate(token_ids=tokens, text="".join(map(str, tokens)))
            events += seen.on_update(update)
    assert [token for event in events for token in event.delta.token_ids] == answer == seen.answers[0].token_ids
    assert "".join(event.delta.text for event in events) == "".join(map(str, answer))
    assert sum(event.HasField("compression") for event in events) == 1
    assert sum(event.HasField("transfer") for event in events) == 1
    assert seen.finished(pb.Placement(), 7).finished.usage == pb.Usage(
        prompt_tokens=5, visual_tokens=4, generated_tokens=len(answer)
    )


def test_an_end_without_a_token_is_said_all_the_same() -> None:
    seen = delivery()
    (event,) = seen.on_update(decode_pb2.SequenceUpdate(finish_reason=pb.FINISH_REASON_STOP))
    assert event.delta == pb.Delta(finish_reason=pb.FINISH_REASON_STOP)
    assert seen.answers[0].reason == pb.FINISH_REASON_STOP


def test_another_token_than_the_delivered_one_is_an_error() -> None:
    seen = delivery()
    seen.on_first_token(prefill_pb2.FirstToken(token_id=1))
    seen.rewind()
    with pytest.raises(InternalError) as caught:
        seen.on_first_token(prefill_pb2.FirstToken(token_id=2))
    assert caught.value.reason == "DIVERGED"
