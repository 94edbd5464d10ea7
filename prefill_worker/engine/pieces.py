"""Where a long prompt is cut: its pieces pass one after the other over the same KV, so that the activations of a whole
prompt are never there at once. What is measured belongs to the whole prompt; `held_rows.py` keeps what that takes."""

from __future__ import annotations

from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.engine.prefix import MIN_TEXT


def cut(prompt: PromptShape, first: int, most: int, *, whole_images: bool) -> list[range]:
    """The tokens of each pass.

    Args:
        prompt: Its tokens from `first` on pass.
        most: Tokens of a piece, `MIN_TEXT` at least; one more where the last piece would be shorter than that. 0 does
            not cut.
        whole_images: Whether visual tokens that follow each other must pass together, however many these are.
    """
    pieces, end = [], prompt.num_tokens
    while first < end:
        stop = first + most if most else end
        if whole_images and stop < end:
            stop = _beside_an_image(prompt, first, stop)
        if end - stop < MIN_TEXT:
            stop = end
        pieces.append(range(first, stop))
        first = stop
    return pieces


def _beside_an_image(prompt: PromptShape, first: int, stop: int) -> int:
    """The border before the image that `stop` lies in, or behind it where nothing would be left before."""
    visual, before, behind = prompt.visual, stop, stop
    while before > first and visual[before - 1] and visual[before : before + 1].all():
        before -= 1
    if before - first >= MIN_TEXT:
        return before
    while behind < prompt.num_tokens and visual[behind] and visual[behind - 1]:
        behind += 1
    return behind
