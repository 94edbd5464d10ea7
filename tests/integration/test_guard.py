"""The quality guard through real processes: a reservation grows, or the smaller parcel is sent."""

from __future__ import annotations

import vlcache
from vlcache import Guard

from models.shapes_vlm.questions import draw_samples
from tests.integration.running_stack import RunningStack
from tests.integration.test_lowering import room_for
from tests.integration.test_observability import samples_of

NEW_TOKENS = 12
SAMPLE = next(iter(draw_samples(seed=990_031, count=1)))


def ask(stack: RunningStack, **compression: float) -> vlcache.Completion:
    with stack.client() as client:
        return client.generate(
            SAMPLE.question,
            images=SAMPLE.images,
            sampling=vlcache.Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True),
            compression=vlcache.Compression(**compression),
        )


def kept_of(answer: vlcache.Completion) -> vlcache.Compressed:
    assert answer.compression is not None
    return answer.compression


def guarded(stack: RunningStack, outcome: str) -> float:
    counted = [line for line in stack.metrics("prefill").splitlines() if f'outcome="{outcome}"' in line]
    return sum(samples_of("\n".join(counted), "vlcache_guard_total"))


def test_everything_crosses_where_the_guard_wants_it(stack: RunningStack) -> None:
    full, guard = ask(stack, retention=1.0), ask(stack, retention=0.05, max_dropped_attention=0.0)
    kept = kept_of(guard)
    assert guard.token_ids == full.token_ids
    assert kept.guard is Guard.FULL
    assert (kept.asked_retention, kept.requested_retention, kept.realised_retention) == (0.05, 1.0, 1.0)
    stack.wait_idle()


def test_without_room_at_the_decode_worker_the_smaller_parcel_is_sent(memory_stack: RunningStack) -> None:
    plain = ask(memory_stack, retention=0.1)
    before = guarded(memory_stack, "refused")
    with room_for(memory_stack, kept_of(plain).prompt_tokens):
        answer = ask(memory_stack, retention=0.1, max_dropped_attention=0.0)
    kept = kept_of(answer)
    assert kept.guard is Guard.REFUSED
    assert (answer.token_ids, kept.kept_bytes) == (plain.token_ids, kept_of(plain).kept_bytes)
    assert guarded(memory_stack, "refused") - before == 1
    memory_stack.wait_idle()
