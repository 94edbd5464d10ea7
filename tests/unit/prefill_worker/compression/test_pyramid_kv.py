"""PyramidKV against its formula in plain numbers."""

from __future__ import annotations

from fractions import Fraction

import pytest

from prefill_worker.compression.pipeline import select_tokens
from prefill_worker.compression.policies.pyramid_kv import PyramidKV
from prefill_worker.compression.policies.snap_kv import SnapKV
from prefill_worker.compression.policy import TokenBudget
from shared.errors import InvalidRequestError
from shared.request.params import Budget
from tests.unit.prefill_worker.compression.observing import observe, positions, prompt_shape, random_attention


def allocate(policy: PyramidKV, retention: str, tokens: int, layers: int) -> list[int]:
    return policy.allocate([], TokenBudget(retention=Fraction(retention), num_tokens=tokens, num_layers=layers))


def naive_shares(mean: float, tokens: int, layers: int, window: int, beta: float) -> list[float]:
    """The authors' formula without its rounding."""
    least = (mean - window) / beta
    most = (mean - window) * 2 - least
    if most > tokens - window:
        most = tokens - window
        least = (mean - window) * 2 - most
    step = (most - least) / (layers - 1)
    return [window + most - layer * step for layer in range(layers)]


@pytest.mark.parametrize(
    ("retention", "tokens", "window", "expected"),
    [
        # B = 80: from 20 + 156 down to 20 + 4
        ("0.1", 1000, 20, [176, 125, 75, 24]),
        # B = 50: 97.5 of 90 tokens do not exist; from 10 + 90 down to 10 + 10
        ("0.6", 100, 10, [100, 73, 47, 20]),
        # no exception for short prompts: B = 18
        ("0.5", 100, 32, [67, 56, 44, 33]),
        # within the window, nothing is left to the pyramid
        ("0.1", 300, 32, [30, 30, 30, 30]),
        ("0.1", 40, 8, [16, 16, 16, 16]),
    ],
)
def test_layers_fall_in_equal_steps(retention: str, tokens: int, window: int, expected: list[int]) -> None:
    assert allocate(PyramidKV(window=window), retention, tokens, layers=4) == expected


@pytest.mark.parametrize("beta", [1.0, 3.5, 20.0, 1000.0])
@pytest.mark.parametrize(("retention", "tokens", "layers"), [("0.2", 997, 7), ("0.53", 640, 28), ("0.9", 333, 2)])
def test_the_total_is_kept_to_the_token(retention: str, tokens: int, layers: int, beta: float) -> None:
    kept = allocate(PyramidKV(window=24, beta=beta), retention, tokens, layers)
    expected = naive_shares(float(retention) * tokens, tokens, layers, 24, beta)
    assert sum(kept) == int(Fraction(retention) * tokens * layers)
    assert all(abs(count - share) <= 1 for count, share in zip(kept, expected, strict=True))


def test_no_layer_falls_below_the_least_number_of_tokens() -> None:
    kept = allocate(PyramidKV(window=1, beta=1000), "0.06", 500, layers=5)
    assert sum(kept) == 150
    assert min(kept) == 16
    assert kept == sorted(kept, reverse=True)


def test_one_layer_gets_everything() -> None:
    assert allocate(PyramidKV(), "0.25", 400, layers=1) == [100]


def test_tokens_are_those_of_snap_kv() -> None:
    prompt, settings = prompt_shape(200, range(5, 150)), {"window": 16, "kernel": 7, "pooling": "max"}
    pyramid, snap = PyramidKV(**settings), SnapKV(**settings)  # type: ignore[arg-type]
    layers = [observe(pyramid, random_attention(prompt, seed)) for seed in range(3)]
    found = select_tokens(pyramid, layers, Budget(max_kept_tokens=40))
    assert [kept.num_kept(2, 200)[0] for kept in found] == [63, 40, 17]
    for layer, kept in zip(layers, found, strict=True):
        (alone,) = select_tokens(snap, [layer], Budget(max_kept_tokens=kept.num_kept(2, 200)[0]))
        assert positions(kept) == positions(alone)


@pytest.mark.parametrize("parameters", [{"beta": 0.9}, {"beta": 1001.0}, {"window": 0}, {"pooling": "sum"}])
def test_bad_parameters_are_refused(parameters: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=f"pyramid_kv: {next(iter(parameters))}"):
        PyramidKV(**parameters)  # type: ignore[arg-type]
