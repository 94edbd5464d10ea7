"""Which tokens are kept: against a sort in plain Python."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from prefill_worker.compression.observation import FALLBACK_ROWS, post_vision_rows
from prefill_worker.compression.policy import PromptShape
from prefill_worker.compression.selection import select_top

SHARES = st.sampled_from([0.0, 0.1, 0.29, 0.5, 1.0])
# few different values: ties are the rule
SCORES = st.integers(1, 40).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 4).map(float), min_size=n, max_size=n), min_size=1, max_size=3)
)


def expected_set(scores: list[float], kept: int, window: int) -> list[int]:
    older = range(len(scores) - window)
    best = sorted(older, key=lambda position: (-scores[position], position))[: kept - window]
    return sorted([*best, *range(len(scores) - window, len(scores))])


@given(scores=SCORES, share=SHARES, data=st.data())
def test_the_best_of_each_head_in_ascending_order(scores: list[list[float]], share: float, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, len(scores[0])))
    window = {0.0: 0, 0.1: kept // 10, 0.29: 29 * kept // 100, 0.5: kept // 2, 1.0: kept}[share]
    chosen = select_top(torch.tensor(scores), kept, share)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == [expected_set(row, kept, window) for row in scores]


@given(scores=SCORES, share=SHARES)
def test_sets_nest_in_the_number_kept(scores: list[list[float]], share: float) -> None:
    """V8."""
    sets = [
        [set(row) for row in select_top(torch.tensor(scores), kept, share).tolist()]
        for kept in range(1, len(scores[0]) + 1)
    ]
    for smaller, larger in itertools.pairwise(sets):
        assert all(inner < outer for inner, outer in zip(smaller, larger, strict=True))


def test_the_recent_window_is_a_tenth_of_the_kept() -> None:
    """V7: position 19 is always kept, and the 9 best of 0 .. 18."""
    scores = torch.arange(20, 0, -1.0)[None]
    assert select_top(scores, 10, 0.1).tolist() == [[*range(9), 19]]
    assert select_top(scores, 9, 0.1).tolist() == [[*range(9)]]


def test_equal_scores_keep_the_lower_positions_however_many_there_are() -> None:
    chosen = select_top(torch.zeros(2, 5000), 700, 0.0)
    assert chosen.tolist() == [[*range(700)]] * 2


def shape(num_tokens: int, last_visual: int | None) -> PromptShape:
    return PromptShape(num_tokens=num_tokens, num_visual=0 if last_visual is None else 1, last_visual=last_visual)


def test_observed_rows_follow_the_last_visual_token() -> None:
    assert post_vision_rows(shape(100, 89), 0) == range(90, 100)
    assert post_vision_rows(shape(100, 0), 0) == range(1, 100)


def test_a_cap_keeps_the_last_rows() -> None:
    assert post_vision_rows(shape(300, 9), 64) == range(236, 300)
    assert post_vision_rows(shape(300, 235), 64) == range(236, 300)
    assert post_vision_rows(shape(300, 236), 64) == range(237, 300)


def test_without_text_after_an_image_the_last_rows_are_observed() -> None:
    assert FALLBACK_ROWS == 50
    assert post_vision_rows(shape(300, None), 0) == range(250, 300)
    assert post_vision_rows(shape(300, 299), 0) == range(250, 300)
    assert post_vision_rows(shape(20, None), 0) == range(20)
    assert post_vision_rows(shape(20, 19), 64) == range(20)
    assert post_vision_rows(shape(300, None), 8) == range(292, 300)
