"""A budget of the visual tokens keeps every token of the text, through real processes."""

from __future__ import annotations

import vlcache

from models.shapes_vlm.questions import draw_samples
from tests.integration.running_stack import RunningStack

SAMPLE = next(iter(draw_samples(seed=990_021, count=1)))


def ask(stack: RunningStack, **compression: object) -> vlcache.Compressed:
    with stack.client() as client:
        answer = client.generate(
            SAMPLE.question,
            images=SAMPLE.images,
            sampling=vlcache.Sampling(max_new_tokens=2, ignore_eos=True),
            compression=vlcache.Compression(**compression),
        )
    assert answer.compression is not None
    return answer.compression


def test_all_text_is_kept_and_a_share_of_the_visual_tokens(stack: RunningStack) -> None:
    kept = ask(stack, retention=0.2, budget_scope="visual")
    layers, text = len(kept.layer_tokens), kept.prompt_tokens - kept.visual_tokens
    assert min(kept.layer_tokens) >= text
    assert sum(kept.layer_tokens) == layers * text + int(0.2 * layers * kept.visual_tokens)
    assert (kept.asked_retention, kept.requested_retention) == (0.2, 0.2)
    stack.wait_idle()


def test_a_count_is_one_of_visual_tokens(memory_stack: RunningStack) -> None:
    kept = ask(memory_stack, max_kept_tokens=30, budget_scope="visual")
    text = kept.prompt_tokens - kept.visual_tokens
    assert sum(kept.layer_tokens) == len(kept.layer_tokens) * (text + 30)
    assert kept.asked_retention == kept.requested_retention == 30 / kept.visual_tokens
