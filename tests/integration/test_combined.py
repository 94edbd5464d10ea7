"""One process in both roles does what two processes do, and nothing travels."""

from __future__ import annotations

import asyncio
import os
import select
import signal

import grpc
import pytest
import vlcache

from deploy.local.forks import Forks
from models.shapes_vlm.questions import draw_samples
from tests.integration.conftest import COMBINED, stack_config
from tests.integration.running_stack import RunningStack
from tests.integration.test_bad_input import BAD_IMAGES, GOOD, compression, send

QUESTIONS = [(sample.question, sample.images) for sample in draw_samples(seed=990_006, count=4)]
QUESTIONS += [("What is the code?", ()), ("Say something, anything, 1 2 3.", ())]


def ask_all(stack: RunningStack, retention: float) -> list[vlcache.Completion]:
    """All questions at once, so that prefills run between the steps of others."""

    async def main() -> list[vlcache.Completion]:
        async with stack.async_client() as client:
            asked = [
                client.generate(
                    question,
                    images=images,
                    sampling=vlcache.Sampling(max_new_tokens=16 + index, ignore_eos=True),
                    compression=vlcache.Compression(retention=retention),
                )
                for index, (question, images) in enumerate(QUESTIONS)
            ]
            return await asyncio.gather(*asked)

    return asyncio.run(main())


@pytest.mark.parametrize("retention", [1.0, 0.1])
def test_tokens_and_compression_are_those_of_two_processes(
    combined_stack: RunningStack, memory_stack: RunningStack, retention: float
) -> None:
    together, apart = ask_all(combined_stack, retention), ask_all(memory_stack, retention)
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in apart]
    assert [answer.compression for answer in together] == [answer.compression for answer in apart]
    combined_stack.wait_idle()


def test_nothing_is_sent_and_all_else_is_counted(combined_stack: RunningStack) -> None:
    with combined_stack.client() as client:
        before = client.info().totals
        answers = [client.generate("Hello " * n, sampling=vlcache.Sampling(max_new_tokens=3)) for n in (1, 30)]
        after = client.info().totals
    assert [answer.transfer.transport for answer in answers] == ["local", "local"]
    assert [answer.transfer.sent_bytes for answer in answers] == [0, 0]
    assert {answer.placement.prefill_worker for answer in answers} == {"combined-0-prefill"}
    assert {answer.placement.decode_worker for answer in answers} == {"combined-0-decode"}
    assert after.kv_sent_bytes == before.kv_sent_bytes == 0
    kept = sum(answer.compression.kept_bytes for answer in answers)
    full = sum(answer.compression.full_bytes for answer in answers)
    assert (after.kv_kept_bytes - before.kv_kept_bytes, after.kv_full_bytes - before.kv_full_bytes) == (kept, full)


def test_each_half_shows_its_own_metrics(combined_stack: RunningStack) -> None:
    with combined_stack.client() as client:
        client.generate("Hello", sampling=vlcache.Sampling(max_new_tokens=3, ignore_eos=True))
    prefill, decode = combined_stack.metrics("prefill"), combined_stack.metrics("decode")
    assert "vlcache_kv_transfer_bytes_total{" in prefill
    assert 'transport="local",worker="combined-0-prefill"} 0.0' in prefill
    assert 'worker="combined-0-decode"' in decode
    assert "vlcache_decode_step_seconds_count" in decode
    assert "vlcache_decode_step_seconds_count" not in prefill


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_leaves_nothing_behind(combined_stack: RunningStack, name: str) -> None:
    with combined_stack.client() as client, pytest.raises(vlcache.InvalidRequest, match="image 2"):
        client.generate("What is this?", images=[GOOD, BAD_IMAGES[name]])
    combined_stack.wait_idle()


def test_a_bad_request_leaves_nothing_behind(combined_stack: RunningStack) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        send(combined_stack, **compression(policy="magic"))
    assert caught.value.code().name == "INVALID_ARGUMENT"
    combined_stack.wait_idle()


def test_grpc_to_itself_is_possible_and_says_the_same(combined_stack: RunningStack, forks: Forks) -> None:
    """`--transport grpc` never takes the short way."""
    with RunningStack(stack_config("grpc", **COMBINED), forks) as stack:
        answers = ask_all(stack, 0.1)
        stack.wait_idle()
    assert {answer.transfer.transport for answer in answers} == {"grpc"}
    assert [answer.token_ids for answer in answers] == [a.token_ids for a in ask_all(combined_stack, 0.1)]


def test_sigterm_lets_running_answers_finish(forks: Forks) -> None:
    with RunningStack(stack_config("auto", **COMBINED), forks) as stack:
        sampling = vlcache.Sampling(max_new_tokens=300, ignore_eos=True)
        pid = stack.child("combined-0").pid
        ended = os.pidfd_open(pid)
        with stack.client() as client, client.stream("Go on", sampling=sampling) as answer:
            next(event for event in answer if isinstance(event, vlcache.Delta))
            os.kill(pid, signal.SIGTERM)
            assert len(answer.result().token_ids) == 300
        # a second signal, with which the stack ends, would kill
        assert select.select([ended], [], [], 30)[0] == [ended]
        os.close(ended)
    assert stack.clean
