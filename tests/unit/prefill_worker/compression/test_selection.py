"""Which tokens are kept: against a sort in plain Python."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.rows import FALLBACK_ROWS, post_vision_rows, probe_rows
from prefill_worker.compression.selection import best_tokens, share_of, with_recent, with_sinks
from tests.unit.prefill_worker.compression.observing import positions, prompt_shape

SHARES = st.sampled_from([0.0, 0.1, 0.29, 0.5, 1.0])
# few different values: ties are the rule
SCORES = st.integers(1, 40).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 4).map(float), min_size=n, max_size=n), min_size=1, max_size=3)
)


def select_top(scores: torch.Tensor, kept: int, recent_share: float) -> list[list[int]]:
    return positions(best_tokens(with_recent(scores, share_of(kept, recent_share)), [kept] * len(scores)))


def expected_set(scores: list[float], kept: int, window: int) -> list[int]:
    older = range(len(scores) - window)
    best = sorted(older, key=lambda position: (-scores[position], position))[: kept - window]
    return sorted([*best, *range(len(scores) - window, len(scores))])


@given(scores=SCORES, share=SHARES, data=st.data())
def test_the_best_of_each_head_in_ascending_order(scores: list[list[float]], share: float, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, len(scores[0])))
    window = {0.0: 0, 0.1: kept // 10, 0.29: 29 * kept // 100, 0.5: kept // 2, 1.0: kept}[share]
    chosen = select_top(torch.tensor(scores), kept, share)
    assert chosen == [expected_set(row, kept, window) for row in scores]


@given(scores=SCORES, share=SHARES)
def test_sets_nest_in_the_number_kept(scores: list[list[float]], share: float) -> None:
    """V8."""
    sets = [
        [set(row) for row in select_top(torch.tensor(scores), kept, share)] for kept in range(1, len(scores[0]) + 1)
    ]
    for smaller, larger in itertools.pairwise(sets):
        assert all(inner < outer for inner, outer in zip(smaller, larger, strict=True))


def test_the_recent_window_is_a_tenth_of_the_kept() -> None:
    """V7: position 19 is always kept, and the 9 best of 0 .. 18."""
    scores = torch.arange(20, 0, -1.0)[None]
    assert select_top(scores, 10, 0.1) == [[*range(9), 19]]
    assert select_top(scores, 9, 0.1) == [[*range(9)]]


def test_equal_scores_keep_the_lower_positions_however_many_there_are() -> None:
    chosen = select_top(torch.zeros(2, 5000), 700, 0.0)
    assert chosen == [[*range(700)]] * 2


def shape(num_tokens: int, last_visual: int | None) -> PromptShape:
    return prompt_shape(num_tokens, () if last_visual is None else (last_visual,))


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


@given(scores=SCORES, data=st.data())
def test_heads_may_keep_different_counts(scores: list[list[float]], data: st.DataObject) -> None:
    kept = [data.draw(st.integers(1, len(row))) for row in scores]
    expected = [expected_set(row, count, 0) for row, count in zip(scores, kept, strict=True)]
    assert positions(best_tokens(torch.tensor(scores), kept)) == expected


def test_what_must_stay_outranks_the_recent_window() -> None:
    scores = with_recent(with_sinks(torch.arange(10.0)[None], 3), 4)
    assert positions(best_tokens(scores, [3])) == [[0, 1, 2]]
    assert positions(best_tokens(scores, [7])) == [[0, 1, 2, 6, 7, 8, 9]]


def test_probes_are_recent_rows_and_random_ones_that_the_content_draws() -> None:
    rows = probe_rows(prompt_shape(1000, seed=5))
    assert len(rows) == len(set(rows)) == 128
    assert list(rows) == sorted(rows)
    assert list(rows[64:]) == list(range(936, 1000))
    assert rows == probe_rows(prompt_shape(1000, seed=5))
    assert rows != probe_rows(prompt_shape(1000, seed=6))


def test_a_short_prompt_is_probed_in_full() -> None:
    assert probe_rows(prompt_shape(128)) == range(128)
    assert len(probe_rows(prompt_shape(129))) == 128
