"""The life of a request when everything goes well."""

from __future__ import annotations

import asyncio

from vlcache.v1 import inference_pb2 as pb
from vlcache.worker.v1 import decode_pb2

from tests.unit.router.fakes import (
    SENT_BYTES,
    TOKEN_BYTES,
    bench,
    compression,
    first_token,
    kinds,
    next_token,
    rest,
    run,
    say,
    text_of,
    transfer,
)


def test_events_come_in_order_and_carry_what_the_workers_said() -> None:
    async def main() -> None:
        async with bench() as b:
            events = await b.answer(request_id="r-1", sampling=pb.SamplingParams(seed=7))
            order = kinds(events)
            assert order[0] == "started"
            assert order[-1] == "finished"
            assert order.count("compression") == order.count("transfer") == 1
            assert order.index("compression") < order.index("transfer")
            assert order[1] == "delta"
            assert text_of(events) == "ABC"
            assert events[0].started == pb.Started(request_id="r-1", model="toy")
            finished = events[-1].finished
            deltas = [each.delta for each in events if each.HasField("delta")]
            assert [each.finish_reason for each in deltas] == [0, 0, pb.FINISH_REASON_LENGTH]
            assert finished.usage == pb.Usage(prompt_tokens=50, visual_tokens=40, generated_tokens=3)
            assert finished.seed == 7
            assert finished.placement == pb.Placement(prefill_worker="prefill-0", decode_worker="decode-0")
            # an answer that ended by itself needs no release
            await b.idle()
            assert b.decode[0].releases == []

    run(main)


def test_workers_get_a_complete_request_and_a_matching_ticket() -> None:
    async def main() -> None:
        async with bench() as b:
            await b.answer(images=1)
            reserve = b.decode[0].reserves[0]
            sent = b.prefill[0].requests[0]
            bound = len(b"what is it?") + 20 + 576
            assert reserve.max_new_tokens == 16
            # a tenth, and the floor that every policy may add
            assert reserve.kept_tokens_bound == -(-bound // 10) + 16
            assert (reserve.model, reserve.compatibility) == ("toy", "same")
            assert reserve.epoch == "decode-0-1"
            assert reserve.prefill_epoch == sent.epoch == "prefill-0-1"
            assert reserve.arena_socket == "/run/prefill-0.sock"
            assert reserve.request_id == sent.request.request_id != ""
            assert reserve.attempt == sent.attempt == 1
            assert sent.request.model == "toy"
            assert sent.request.compression.policy == "vl_cache"
            assert sent.request.compression.retention == 0.1
            assert sent.request.sampling.HasField("seed")
            ticket = sent.ticket
            assert (ticket.decode_worker, ticket.decode_address) == ("decode-0", b.decode[0].address)
            assert (ticket.token, ticket.transport) == (b"token-1", "memory")
            assert ticket.lease_s == 30

    run(main)


def test_time_left_travels_with_the_prompt() -> None:
    async def main() -> None:
        async with bench() as b:
            await b.answer(timeout=10.0)
            assert 0 < b.prefill[0].time_left_s < 10.0

    run(main)


def test_first_token_that_ends_the_answer_releases_the_reservation() -> None:
    async def main() -> None:
        async with bench() as b:
            b.prefill[0].script = lambda _: [first_token("no", pb.FINISH_REASON_STOP), compression()]
            events = await b.answer()
            assert kinds(events) == ["started", "delta", "compression", "finished"]
            assert events[1].delta.finish_reason == pb.FINISH_REASON_STOP
            assert events[-1].finished.usage.generated_tokens == 1
            await b.idle()
            assert b.decode[0].releases == [b"token-1"]
            assert b.decode[0].attached == []

    run(main)


def test_transfer_is_delivered_before_finished_even_when_decode_is_faster() -> None:
    async def main() -> None:
        async with bench() as b:
            late = asyncio.Event()
            b.prefill[0].script = lambda _: [first_token(), compression(), late.wait(), transfer()]
            call = b.ask()
            seen = [await call.read() for _ in range(5)]
            assert kinds(seen) == ["started", "delta", "compression", "delta", "delta"]
            late.set()
            last = await rest(call)
            assert kinds(last) == ["transfer", "finished"]
            assert last[0].transfer.sent_bytes == SENT_BYTES

    run(main)


def test_a_prefill_call_that_does_not_end_cannot_hold_the_answer_back() -> None:
    async def main() -> None:
        async with bench(control_timeout_s=0.2) as b:
            b.prefill[0].script = lambda _: [first_token(), compression(), asyncio.Event().wait()]
            events = await b.answer(request_id="slow-end")
            assert kinds(events) == ["started", "delta", "compression", "delta", "delta", "finished"]
            assert await b.prefill[0].cancelled.reaches(1) == "slow-end"

    run(main)


def test_tokens_never_overtake_those_of_the_prefill_worker_and_keep_their_order() -> None:
    async def main() -> None:
        async with bench() as b:
            texts = [chr(ord("B") + number) for number in range(20)]
            b.decode[0].script = say(*texts)
            ahead = [next_token("-", 100), next_token("+", 101)]
            b.prefill[0].script = lambda _: [first_token(), *ahead, compression(), transfer()]
            events = await b.answer()
            assert text_of(events) == "A-+" + "".join(texts)
            ids = [token for event in events for token in event.delta.token_ids]
            assert ids == [1, 100, 101, *range(2, 22)]
            assert events[-1].finished.usage.generated_tokens == 23


def test_a_token_that_was_decoded_ahead_may_end_the_answer() -> None:
    async def main() -> None:
        async with bench() as b:
            b.prefill[0].script = lambda _: [first_token(), next_token(".", 9, pb.FINISH_REASON_STOP)]
            events = await b.answer()
            assert kinds(events) == ["started", "delta", "delta", "finished"]
            assert events[-1].finished.usage.generated_tokens == 2
            await b.idle()
            assert b.decode[0].releases == [b"token-1"]
            assert b.decode[0].attached == []

    run(main)


def test_several_tokens_in_one_update_and_an_end_without_any() -> None:
    async def main() -> None:
        async def script(stream, handle, token) -> None:
            stream.send(decode_pb2.SequenceUpdate(handle=handle, token_ids=[2, 3], text="xy"))
            stream.send(decode_pb2.SequenceUpdate(handle=handle, finish_reason=pb.FINISH_REASON_STOP))

        async with bench() as b:
            b.decode[0].script = script
            events = await b.answer()
            deltas = [event.delta for event in events if event.HasField("delta")]
            said = [pb.Delta(token_ids=[1], text="A"), pb.Delta(token_ids=[2, 3], text="xy")]
            assert deltas == [*said, pb.Delta(finish_reason=pb.FINISH_REASON_STOP)]
            assert events[-1].finished.usage.generated_tokens == 3

    run(main)


def test_many_requests_share_one_token_stream() -> None:
    async def main() -> None:
        async with bench() as b:
            together = asyncio.Event()

            async def script(stream, handle, token) -> None:
                if len(b.decode[0].attached) == 30:
                    together.set()
                await together.wait()
                await say(f"<{handle}>")(stream, handle, token)

            b.decode[0].script = script
            answers = await asyncio.gather(*(b.answer() for _ in range(30)))
            assert len(b.decode[0].streams) == 1
            # every request got the tokens of its own handle: all different
            assert sorted(text_of(answer) for answer in answers) == sorted(f"A<{n}>" for n in range(1, 31))

    run(main)


def test_one_message_can_carry_the_tokens_of_two_requests() -> None:
    async def main() -> None:
        async def script(stream, handle, token) -> None:
            if len(stream.sequences) == 2:
                stream.send(
                    *(
                        decode_pb2.SequenceUpdate(
                            handle=each, token_ids=[9], text=str(each), finish_reason=pb.FINISH_REASON_STOP
                        )
                        for each in stream.sequences
                    )
                )
                b.decode[0].live.clear()

        async with bench() as b:
            b.decode[0].script = script
            answers = await asyncio.gather(b.answer(), b.answer())
            assert sorted(map(text_of, answers)) == ["A1", "A2"]

    run(main)


def test_load_is_counted_while_a_request_runs_and_gone_after_it() -> None:
    async def main() -> None:
        async with bench() as b:
            goes_on = asyncio.Event()
            b.prefill[0].script = lambda _: [goes_on.wait(), first_token(), compression(), transfer()]
            call = b.ask()
            await b.prefill[0].requests.reaches(1)
            assert b.worker("prefill-0").load == len(b"what is it?") + 20
            assert b.worker("decode-0").load == (b.decode[0].reserves[0].kept_tokens_bound + 16) * TOKEN_BYTES
            b.router.check_integrity()
            goes_on.set()
            assert kinds([event async for event in call])[-1] == "finished"
            assert b.worker("prefill-0").load == b.worker("decode-0").load == 0

    run(main)


def test_an_id_may_be_used_again_after_its_answer() -> None:
    async def main() -> None:
        async with bench() as b:
            for _ in range(3):
                assert kinds(await b.answer(request_id="again"))[-1] == "finished"

    run(main)


def test_models_and_server_info() -> None:
    async def main() -> None:
        async with bench() as b:
            await b.answer()
            (model,) = (await b.stub.ListModels(pb.ListModelsRequest())).models
            assert (model.name, model.kv_bytes_per_token, model.max_images) == ("toy", TOKEN_BYTES, 2)
            assert (model.default_policy, list(model.policies)) == ("vl_cache", ["vl_cache", "streaming"])
            info = await b.stub.GetServerInfo(pb.GetServerInfoRequest())
            workers = {worker.name: worker for worker in info.workers}
            assert workers["prefill-0"].role == "prefill"
            assert workers["decode-0"].kv.capacity == 1 << 20
            assert {worker.state for worker in info.workers} == {"ready"}
            sums = {"kv_full_bytes": 1000, "kv_kept_bytes": 100, "kv_sent_bytes": SENT_BYTES}
            assert info.totals == pb.Totals(requests=1, generated_tokens=3, **sums)
            assert (info.requests_running, info.requests_waiting) == (0, 0)

    run(main)
