"""Post-vision statistics by the tiles of the processor, against the attention matrix in float64 and the reference."""

from __future__ import annotations

import itertools
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.kernels.native import build as build_module
from shared.kernels.native import library as library_module
from shared.kernels.native import statistics as native
from shared.kernels.native.build import FOLDER, build
from shared.kernels.native.library import slab_attention_function, statistics_function
from shared.kernels.reference.statistics import PostVisionStatistics, post_vision_statistics
from tests.kernels.brute_force import attention_matrix, statistics
from tests.kernels.instruction_sets import tiles_miss

Kernel = Callable[..., PostVisionStatistics]
COMPILER = shlex.split(os.environ.get("CC") or "cc")
# fp32 sums of up to 900 probabilities
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
# a logit is known to about this much: a count may differ by the entries that are as close to the threshold
LOGIT_ERROR = 1e-4
KEYS, ROWS = (63, 100, 1000), (1, 7, 64, 129)
SIZES = [(keys, rows) for keys, rows in itertools.product(KEYS, ROWS) if rows <= keys]
SIZES += [(1, 1), (16, 16), (63, 63), (100, 100), (129, 129), (512, 64), (4100, 3)]
# GQA group, head dim
HEADS = [(1, 32), (2, 64), (4, 96), (7, 128)]


@pytest.fixture(scope="module")
def library() -> Path:
    if shutil.which(COMPILER[0]) is None:
        pytest.skip("no C compiler")
    return build(COMPILER)


@pytest.fixture
def kernel(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """The native kernel, which may call nobody for help."""
    reason = tiles_miss(COMPILER)
    if reason:
        pytest.skip(reason)
    statistics_function.cache_clear()
    assert native.available()
    monkeypatch.setattr(native.reference, "post_vision_statistics", refused)
    threads = torch.get_num_threads()
    yield native.post_vision_statistics
    torch.set_num_threads(threads)


def refused(*arguments: object) -> PostVisionStatistics:
    raise AssertionError("the reference was called")


def as_the_model_leaves_it(tensor: torch.Tensor, before: int = 0) -> torch.Tensor:
    """[heads, tokens, head_dim] as a view of [tokens, heads, head_dim], within memory that is NaN."""
    heads, tokens, head_dim = tensor.shape
    memory = tensor.new_full((before + tokens + 3, heads + 1, head_dim + 8), torch.nan)
    view = memory[before : before + tokens, :heads, :head_dim].transpose(0, 1)
    return view.copy_(tensor)


def draw(keys: int, rows: int, group: int, head_dim: int, kv_heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(keys * 1000 + rows)
    query = 2 * torch.randn(group * kv_heads, rows, head_dim, generator=generator)
    key = torch.randn(kv_heads, keys, head_dim, generator=generator)
    visual = torch.rand(keys, generator=generator) < 0.6
    return [as_the_model_leaves_it(query.bfloat16(), before=5), as_the_model_leaves_it(key.bfloat16()), visual]


def whole_numbers(largest: int, keys: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits are exact in any precision and order."""
    generator = torch.Generator().manual_seed(keys)
    query = torch.randint(-largest, largest + 1, (8, rows, 32), generator=generator)
    key = torch.randint(-largest, largest + 1, (2, keys, 32), generator=generator)
    return query.bfloat16(), key.bfloat16()


def assert_close(found: torch.Tensor, expected: np.ndarray) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), **TOLERANCE)


def assert_same(found: PostVisionStatistics, expected: PostVisionStatistics) -> None:
    for left, right in zip(found, expected, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


@pytest.mark.parametrize(("keys", "rows"), SIZES)
@pytest.mark.parametrize(("group", "head_dim"), HEADS)
def test_it_is_the_attention_matrix_summed(kernel: Kernel, keys: int, rows: int, group: int, head_dim: int) -> None:
    query, key, visual = draw(keys, rows, group, head_dim)
    scaling, threshold = head_dim**-0.5, 0.02
    found = kernel(query, key, keys - rows, scaling, threshold, visual)
    matrix = attention_matrix(query, key, keys - rows, scaling)
    columns, fewest = statistics(matrix, 2, threshold * (1 + LOGIT_ERROR))
    _, most = statistics(matrix, 2, threshold * (1 - LOGIT_ERROR))
    assert_close(found.column_sums, columns)
    assert found.counts.dtype == torch.int64
    assert all(fewest <= found.counts.numpy())
    assert all(found.counts.numpy() <= most)
    assert_close(found.visual_mass, matrix[..., visual.numpy()].sum(axis=-1))
    assert_close(found.text_mass, matrix[..., ~visual.numpy()].sum(axis=-1))


@pytest.mark.parametrize("head_dim", [32, 96, 128, 256])
def test_it_is_what_the_reference_finds(kernel: Kernel, head_dim: int) -> None:
    query, key, visual = draw(700, 70, 4, head_dim)
    found = kernel(query, key, 630, head_dim**-0.5, 0.01, visual)
    expected = post_vision_statistics(query, key, 630, head_dim**-0.5, 0.01, visual)
    assert (found.counts - expected.counts).abs().max() <= 2
    for name in ("column_sums", "visual_mass", "text_mass"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **TOLERANCE)


@pytest.mark.parametrize("largest", [2, 16])
@pytest.mark.parametrize(("keys", "rows"), [(70, 70), (107, 70), (300, 1)])
def test_exact_logits_are_counted_exactly(kernel: Kernel, largest: int, keys: int, rows: int) -> None:
    """Up to 10,000 and down to as much below zero where numbers are large."""
    query, key = whole_numbers(largest, keys, rows)
    key[:, 0], query[:, 0] = largest, -largest if rows > 1 else largest
    matrix = attention_matrix(query, key, keys - rows, 1.25)
    for threshold in (1e-20, 0.01, 0.3, 1.0):
        found = kernel(query, key, keys - rows, 1.25, threshold)
        columns, counts = statistics(matrix, 2, threshold)
        assert_close(found.column_sums, columns)
        assert found.counts.tolist() == counts.tolist()


@pytest.mark.parametrize(("threshold", "reached"), [(0.5, 1), (1e-20, 2), (1e-30, 3)])
def test_entries_that_underflow_are_neither_lost_nor_counted(kernel: Kernel, threshold: float, reached: int) -> None:
    """Logits 25 apart: beyond the fourth, exp() of the difference to the first is no normal number of fp32."""
    query, key = torch.zeros(1, 3, 32).bfloat16(), torch.zeros(1, 20, 32).bfloat16()
    query[..., 0], key[..., 0] = 25, -torch.arange(20.0)
    found = kernel(query, key, 17, 1.0, threshold)
    assert found.counts.tolist() == [3 * reached]
    torch.testing.assert_close(found.column_sums[0], 3 * torch.exp(-25 * torch.arange(20.0)), atol=1e-25, rtol=1e-5)


@pytest.mark.parametrize("all_visual", [True, False])
def test_a_part_without_keys_has_no_mass(kernel: Kernel, all_visual: bool) -> None:
    query, key, _ = draw(100, 37, 4, 32)
    found = kernel(query, key, 63, 0.3, 0.1, torch.full((100,), all_visual))
    whole, empty = (found.visual_mass, found.text_mass) if all_visual else (found.text_mass, found.visual_mass)
    assert not empty.any()
    torch.testing.assert_close(whole, torch.ones_like(whole))


def test_masses_are_computed_when_asked_for_and_change_nothing_else(kernel: Kernel) -> None:
    query, key, visual = draw(100, 37, 4, 32)
    plain = kernel(query, key, 63, 0.3, 0.1)
    assert (plain.visual_mass, plain.text_mass) == (None, None)
    assert_same(kernel(query, key, 63, 0.3, 0.1, visual)[:2], plain[:2])
    every_other = torch.zeros(200, dtype=torch.bool)
    every_other[::2] = visual
    assert_same(kernel(query, key, 63, 0.3, 0.1, every_other[::2]), kernel(query, key, 63, 0.3, 0.1, visual))


def test_nothing_is_read_beside_the_rows_and_keys_nor_before_it_is_written(kernel: Kernel) -> None:
    query, key, visual = draw(77, 37, 7, 64)
    expected = kernel(query.contiguous(), key.contiguous(), 40, 0.1, 0.1, visual)
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    try:
        assert torch.empty(1).isnan()
        found = kernel(query, key, 40, 0.1, 0.1, visual)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(numbers).all() for numbers in found)
    assert_same(found, expected)


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_neither_threads_nor_repetition_change_a_bit(kernel: Kernel, threads: int) -> None:
    query, key, visual = draw(300, 70, 4, 64, kv_heads=3)
    torch.set_num_threads(1)
    single = kernel(query, key, 230, 0.3, 0.01, visual)
    torch.set_num_threads(threads)
    for _ in range(20):
        assert_same(kernel(query, key, 230, 0.3, 0.01, visual), single)


def test_without_openmp_one_thread_does_it(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, visual = draw(300, 70, 4, 64)
    expected = kernel(query, key, 230, 0.3, 0.01, visual)
    monkeypatch.setattr(native, "gomp_parallel", lambda: None)
    torch.set_num_threads(2)
    assert_same(kernel(query, key, 230, 0.3, 0.01, visual), expected)


def test_torch_s_own_tile_products_are_left_as_they_were(kernel: Kernel) -> None:
    """Both configure the tiles of the same thread."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator).bfloat16() for _ in range(2))
    expected = left @ right
    query, key, _ = draw(300, 70, 4, 64)
    first = kernel(query, key, 230, 0.3, 0.01)
    assert torch.equal(left @ right, expected)
    assert_same(kernel(query, key, 230, 0.3, 0.01)[:2], first[:2])


def test_rows_that_are_not_the_last_ones_are_a_bug(kernel: Kernel) -> None:
    query, key, _ = draw(8, 4, 1, 32)
    for first_row in (3, 5):
        with pytest.raises(AssertionError, match="last ones"):
            kernel(query, key, first_row, 1.0, 0.5)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "step", "scaling"),
    [
        (torch.float32, 64, 1, 0.1),
        (torch.float16, 64, 1, 0.1),
        (torch.bfloat16, 80, 1, 0.1),
        (torch.bfloat16, 288, 1, 0.1),
        (torch.bfloat16, 64, 2, 0.1),
        (torch.bfloat16, 64, 1, -0.1),
    ],
)
def test_what_the_kernel_does_not_serve_runs_on_torch(
    library: Path, dtype: torch.dtype, head_dim: int, step: int, scaling: float
) -> None:
    query, key, visual = draw(100, 37, 4, head_dim * step)
    arguments = query.to(dtype)[..., ::step], key.to(dtype)[..., ::step], 63, scaling, 0.01, visual
    assert_same(native.post_vision_statistics(*arguments), post_vision_statistics(*arguments))


def test_without_the_library_torch_does_it_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library_module, "library_path", lambda: tmp_path / "missing.so")
    statistics_function.cache_clear()
    arguments = *draw(100, 37, 4, 64)[:2], 63, 0.1, 0.01, torch.ones(100, dtype=torch.bool)
    for _ in range(2):
        assert_same(native.post_vision_statistics(*arguments), post_vision_statistics(*arguments))
    assert not native.available()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    statistics_function.cache_clear()


def test_a_library_without_the_tiles_has_the_other_kernels(
    library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As an older compiler would leave it."""
    for source in FOLDER.glob("*.[ch]"):
        shutil.copy(source, tmp_path)
    monkeypatch.setattr(build_module, "FOLDER", tmp_path)
    older = tmp_path / "older.py"
    older.write_text("import subprocess, sys\nif '-mamx-tile' in sys.argv: sys.exit(1)\n")
    with older.open("a") as script:
        script.write(f"sys.exit(subprocess.run([*{COMPILER!r}, *sys.argv[1:]]).returncode)\n")
    path = build([sys.executable, str(older)])
    monkeypatch.setattr(library_module, "library_path", lambda: path)
    for function in (statistics_function, slab_attention_function):
        function.cache_clear()
    with caplog.at_level(logging.INFO, logger=library_module.__name__):
        assert not native.available()
    assert [record.getMessage().endswith("no AMX") for record in caplog.records] == [True]
    assert slab_attention_function() is not None
    for function in (statistics_function, slab_attention_function):
        function.cache_clear()
