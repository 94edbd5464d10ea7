"""Where long prompts are cut."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.engine.pieces import cut
from prefill_worker.engine.prefix import MIN_TEXT


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 9)), min_size=1, max_size=12),
    st.integers(0, 5),
    st.integers(MIN_TEXT, 12),
    st.booleans(),
)
def test_pieces_are_the_prompt_and_no_longer_than_they_must_be(
    runs: list[tuple[bool, int]], first: int, most: int, whole_images: bool
) -> None:
    visual = torch.tensor([kind for kind, length in runs for _ in range(length)])
    prompt = PromptShape(visual=visual)
    pieces = cut(prompt, first, most, whole_images=whole_images)
    assert [token for piece in pieces for token in piece] == list(range(first, len(visual)))
    # a prefix leaves so many tokens at least
    assert all(len(piece) >= MIN_TEXT for piece in pieces if len(visual) - first >= MIN_TEXT)
    for piece, following in zip(pieces, pieces[1:], strict=False):
        cuts = bool(visual[piece.stop - 1] and visual[following.start])
        assert not (whole_images and cuts)
    for piece in pieces:
        if not whole_images:
            assert len(piece) <= most + MIN_TEXT - 1
        elif len(piece) > most + MIN_TEXT - 1:
            # an image, which alone is as long, and little text before it
            assert visual[piece.start + MIN_TEXT : piece.start + most].all()


def test_a_short_prompt_is_not_cut() -> None:
    prompt = PromptShape(visual=torch.zeros(8, dtype=torch.bool))
    assert cut(prompt, 0, 8, whole_images=False) == [range(8)]
    assert cut(prompt, 3, 0, whole_images=False) == [range(3, 8)]
