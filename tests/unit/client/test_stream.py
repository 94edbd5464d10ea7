import threading

import grpc
import pytest
import vlcache
from vlcache import Cancelled, Client, DeadlineExceeded, Delta, FinishReason, Timeout
from vlcache.v1 import inference_pb2 as pb

from tests.unit.client.service import compression, delta, fail, finished, pause, started, transfer, whole_answer


def test_events_arrive_typed_and_in_order(service, client):
    service.attempts = [whole_answer()]
    with client.stream("?", request_id="r1") as stream:
        assert stream.request_id == "r1"
        events = list(stream)
    assert [type(event).__name__ for event in events] == [
        "Started",
        "Delta",
        "Compressed",
        "Transferred",
        "Delta",
        "Delta",
        "Finished",
    ]
    assert events[0] == vlcache.Started(request_id="r1", model="shapes-vlm")
    assert events[1] == Delta(text="a ", token_ids=(5,))
    assert events[2] == vlcache.Compressed(
        policy="vl_cache",
        asked_retention=0.1,
        requested_retention=0.1,
        realised_retention=0.125,
        full_bytes=2 * 2**20,
        kept_bytes=2**18,
        layer_tokens=(20, 12),
        layer_attention_mass=(0.5, 0.75),
        prompt_tokens=128,
        visual_tokens=100,
    )
    assert events[3] == vlcache.Transferred(transport="memory", sent_bytes=300_000, seconds=0.002)
    assert events[-2] == Delta(text=" dot", token_ids=(7,), finish_reason=FinishReason.STOP)
    assert events[-1] == vlcache.Finished(
        usage=vlcache.Usage(prompt_tokens=128, visual_tokens=100, generated_tokens=3),
        seed=2**63 + 1,
        placement=vlcache.Placement(prefill_worker="p0", decode_worker="d0"),
    )


def test_kept_tokens_arrive_typed(service, client):
    told = compression()
    told.compression.kept.num_kv_heads = 4
    told.compression.kept.layers.extend([bytes([4, 0, 3]), bytes([1, 1, 4])])
    told.compression.kept.images.add(first_token=1, rows=1, columns=2, left=-0.5, top=0.25, right=1.5, bottom=0.75)
    service.attempts = [[started(), delta("a", 5), told, finished()]]
    completion = client.generate("Which?", compression=vlcache.Compression(explain=True))
    assert service.requests[0].compression.explain
    grid = vlcache.ImageGrid(first_token=1, rows=1, columns=2, box=(-0.5, 0.25, 1.5, 0.75))
    assert completion.compression.kept == vlcache.Kept(num_kv_heads=4, layers=((4, 0, 3), (1, 1, 4)), images=(grid,))
    assert grid.tokens == range(1, 3)


def test_generate_collects_the_whole_answer(service, client):
    service.attempts = [whole_answer()]
    completion = client.generate("Which?", images=[b"img"], request_id="r1")
    assert (completion.request_id, completion.model) == ("r1", "shapes-vlm")
    assert (completion.text, completion.token_ids) == ("a red dot", (5, 6, 7))
    assert completion.finish_reason is FinishReason.STOP
    assert completion.usage.text_tokens == 28
    assert completion.compression.kept_bytes == 2**18
    assert completion.transfer.transport == "memory"
    assert completion.seed == 2**63 + 1
    assert completion.placement.decode_worker == "d0"
    assert service.requests[0].messages[0].parts[0].image.data == b"img"


def test_timings_follow_the_arrival_of_token_ids(service, client):
    # Empty deltas and the other events are no tokens; the last delta carries two at once.
    service.attempts = [
        [started(), pause(0.05), delta("", 1), compression(), delta("x"), pause(0.1), delta("y", 2, 3), finished()]
    ]
    timings = client.generate("?").timings
    assert timings.ttft_s >= 0.05
    assert timings.ttst_s >= timings.ttft_s + 0.09
    assert timings.itl_s == (pytest.approx(timings.ttst_s - timings.ttft_s), 0.0)
    assert timings.e2e_s == timings.ttst_s


def test_an_answer_without_tokens_has_no_token_times(service, client):
    service.attempts = [[started(), pause(0.02), finished(0)]]
    completion = client.generate("?")
    assert (completion.timings.ttft_s, completion.timings.ttst_s, completion.timings.itl_s) == (None, None, ())
    assert completion.timings.e2e_s >= 0.02
    assert (completion.compression, completion.transfer) == (None, None)


def test_result_reads_what_is_left(service, client):
    service.attempts = [whole_answer()]
    with client.stream("?") as stream:
        next(stream)
        next(stream)
        assert stream.result().text == "a red dot"
    assert stream.result().text == "a red dot"
    assert list(stream) == []


def test_leaving_early_cancels_the_request(service, client):
    service.attempts = [[started(), delta("a", 1), service.hang]]
    with client.stream("?") as stream:
        for event in stream:
            if isinstance(event, Delta):
                break
    assert service.cancelled.wait(5)
    assert list(stream) == []
    with pytest.raises(Cancelled):
        stream.result()


def test_an_exception_in_the_block_cancels_the_request(service, client):
    service.attempts = [[started(), service.hang]]

    def interrupted():
        with client.stream("?") as stream:
            next(stream)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert service.cancelled.wait(5)


def test_closing_from_another_thread_ends_a_blocked_read(service, client):
    service.attempts = [[started(), service.hang]]
    with client.stream("?") as stream:
        next(stream)
        closer = threading.Timer(0.05, stream.close)
        closer.start()
        with pytest.raises(Cancelled, match="closed"):
            next(stream)
        closer.join()
    assert service.cancelled.wait(5)


def test_nothing_is_sent_before_the_first_event_is_asked_for(service, client):
    with client.stream("?"):
        pass
    assert service.requests == []


def test_the_deadline_reaches_the_service_and_ends_the_call(service):
    service.attempts = [[started(), service.hang]]
    with (
        Client(service.address, timeout=Timeout(total_s=0.6)) as client,
        pytest.raises(DeadlineExceeded) as caught,
    ):
        client.generate("?", request_id="slow")
    assert caught.value.request_id == "slow"
    assert 0 < service.remaining_s[0] < 0.7
    assert service.cancelled.wait(5)


def test_a_late_first_token_ends_the_call(service):
    service.attempts = [[started(), service.hang]]
    with Client(service.address, timeout=Timeout(first_token_s=0.5)) as client, client.stream("?") as stream:
        next(stream)
        with pytest.raises(DeadlineExceeded, match=r"no token within 0\.5 s") as caught:
            next(stream)
    assert caught.value.details["stage"] == "first_token"
    assert service.cancelled.wait(5)


def test_the_first_token_limit_ends_with_the_first_token(service):
    service.attempts = [[started(), delta("a", 1), pause(0.7), delta("b", 2), finished(2)]]
    with Client(service.address, timeout=Timeout(first_token_s=0.5)) as client:
        assert client.generate("?").text == "ab"


@pytest.mark.parametrize("events", [[], [started()], [started(), delta("a", 1), compression(), transfer()]])
def test_an_error_after_any_stage_reaches_the_caller(service, client, events):
    service.attempts = [[*events, fail(grpc.StatusCode.DATA_LOSS, "digest differs")]]
    seen = []
    with client.stream("?") as stream, pytest.raises(vlcache.DataLoss, match="digest differs"):
        seen.extend(iter(stream))
    assert list(stream) == []
    assert len(service.requests) == 1


def test_a_stream_without_finished_is_an_error(service, client):
    service.attempts = [[started(), delta("a", 1)]]
    with pytest.raises(vlcache.InternalError, match="finished"):
        client.generate("?")


def test_events_and_reasons_of_a_newer_service_are_tolerated(service, client):
    service.attempts = [[pb.GenerateResponse(), started(), delta("a", 1, reason=99), finished(1)]]
    completion = client.generate("?")
    assert (completion.text, completion.finish_reason) == ("a", FinishReason.UNSPECIFIED)


def several() -> list:
    """Three answers in turns; the second has ended before the others."""
    said = [(0, "a ", 5), (1, "no", 8), (2, "b", 9), (0, "red", 6), (2, "lue", 4), (0, " dot", 7)]
    deltas = [delta(text, token) for _, text, token in said]
    for (choice, text, _), event in zip(said, deltas, strict=True):
        event.delta.choice = choice
        event.delta.finish_reason = {"no": pb.FINISH_REASON_STOP, " dot": pb.FINISH_REASON_STOP}.get(text, 0)
    deltas[4].delta.finish_reason = pb.FINISH_REASON_LENGTH
    return [started(), *deltas[:3], compression(), transfer(), *deltas[3:], finished(6)]


def test_several_answers_are_told_apart(service, client):
    service.attempts = [several()]
    completion = client.generate("Which?", sampling=vlcache.Sampling(n=3, temperature=1.0))
    assert service.requests[0].sampling.n == 3
    assert completion.choices == (
        vlcache.Choice(text="a red dot", token_ids=(5, 6, 7), finish_reason=FinishReason.STOP),
        vlcache.Choice(text="no", token_ids=(8,), finish_reason=FinishReason.STOP),
        vlcache.Choice(text="blue", token_ids=(9, 4), finish_reason=FinishReason.LENGTH),
    )
    first = completion.choices[0]
    assert (completion.text, completion.token_ids) == (first.text, first.token_ids)
    assert completion.finish_reason is first.finish_reason
    assert len(completion.timings.itl_s) == 2, "gaps of the first answer"


def test_a_lone_answer_is_the_only_choice(service, client):
    service.attempts = [whole_answer()]
    completion = client.generate("Which?")
    assert [choice.text for choice in completion.choices] == [completion.text]
    assert service.requests[0].sampling.n == 0


@pytest.mark.parametrize("n", [0, 17])
def test_impossible_numbers_of_answers_are_refused_at_once(n):
    with pytest.raises(ValueError, match=r"n must be in \[1, 16\]"):
        vlcache.Sampling(n=n)
