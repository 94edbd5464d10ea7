"""Who joins whom and what the groups become: against loops."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from prefill_worker.compression.merging import BLOCK_ROWS, groups_of, most_similar, nearest


@st.composite
def masks(draw: st.DrawFn, *, least: int = 0) -> torch.Tensor:
    """[heads, tokens] bool; `least` true ones per head."""
    tokens = draw(st.integers(max(1, least), 20))
    rows = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    mask = torch.tensor(draw(st.lists(rows, min_size=1, max_size=3)))
    mask[:, :least] = True
    return mask


def naive_nearest(targets: list[bool], runs: list[int], at: int) -> int | None:
    candidates = [place for place, target in enumerate(targets) if target and runs[place] == runs[at]]
    return min(candidates, key=lambda place: (abs(place - at), place), default=None)


@given(targets=masks(), data=st.data())
def test_the_nearest_target_of_the_same_run(targets: torch.Tensor, data: st.DataObject) -> None:
    heads, tokens = targets.shape
    steps = data.draw(st.lists(st.integers(0, 1), min_size=heads * tokens, max_size=heads * tokens))
    runs = torch.tensor(steps).cumsum(0).view(heads, tokens)
    found, exists = nearest(targets, runs)
    for head in range(heads):
        for at in range(tokens):
            expected = naive_nearest(targets[head].tolist(), runs[head].tolist(), at)
            assert exists[head, at] == (expected is not None)
            assert expected is None or found[head, at] == expected


@given(targets=masks())
def test_without_runs_all_may_join(targets: torch.Tensor) -> None:
    found, exists = nearest(targets)
    same, also = nearest(targets, torch.zeros_like(targets, dtype=torch.long))
    assert torch.equal(exists, also)
    assert torch.equal(found, same)
    assert exists.any(dim=1).tolist() == targets.any(dim=1).tolist()


@given(chosen=masks(least=1), seed=st.integers(0, 99))
def test_groups_add_up_what_joins(chosen: torch.Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads, tokens = chosen.shape
    kept = [row.nonzero().flatten() for row in chosen]
    target = torch.stack([places[torch.randint(len(places), (tokens,), generator=generator)] for places in kept])
    joins = torch.rand(heads, tokens, generator=generator) < 0.6
    values = torch.randint(-8, 8, (heads, tokens, 3), generator=generator)  # whole numbers: sums are exact
    groups = groups_of(chosen, target, joins)
    expected = []
    for head, places in enumerate(kept):
        for place in places.tolist():
            there = [
                at for at in range(tokens) if not chosen[head, at] and joins[head, at] and target[head, at] == place
            ]
            expected.append(values[head, sorted([*there, place])])
    members = groups.members(values)
    assert groups.sizes.tolist() == [len(group) for group in expected]
    assert torch.equal(members, torch.cat(expected).float())
    assert torch.equal(groups.sums(members), torch.stack([group.sum(dim=0) for group in expected]).float())
    assert torch.allclose(groups.means(members), torch.stack([group.float().mean(dim=0) for group in expected]))
    spread = [index for index, group in enumerate(expected) for _ in group]
    assert groups.spread(torch.arange(len(expected))).tolist() == spread


def test_the_most_similar_kept_key_of_the_same_head() -> None:
    generator = torch.Generator().manual_seed(1)
    key = torch.randn(2, BLOCK_ROWS + 63, 5, generator=generator)
    chosen = torch.rand(key.shape[:2], generator=generator) < 0.02
    found, cosine = most_similar(key, chosen)
    for head, kept in enumerate(chosen):
        candidates = kept.nonzero().flatten()
        for at in range(0, key.shape[1], 7):
            cosines = torch.cosine_similarity(key[head, at].double(), key[head, candidates].double(), dim=1)
            assert found[head, at] == candidates[cosines.argmax()]
            torch.testing.assert_close(cosine[head, at].double(), cosines.max(), rtol=0, atol=1e-6)


def test_equally_similar_keys_leave_the_lower_position_and_length_says_nothing() -> None:
    key = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [3.0, 0.0], [0.0, 4.0], [0.0, 1.0], [0.0, 0.0]]])
    chosen = torch.tensor([[True, False, True, True, False, False]])
    found, cosine = most_similar(key, chosen)
    assert found[0, [1, 4, 5]].tolist() == [0, 3, 0]
    assert cosine[0, [1, 4, 5]].tolist() == [1.0, 1.0, 0.0]
