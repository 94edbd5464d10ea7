"""The statistics of the observed rows, both twins against the full attention matrix in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shared.kernels.dispatch import Kernels
from shared.kernels.reference.statistics import ROW_BLOCK, post_vision_statistics
from shared.model.attention import PREFILL_ATTENTION
from tests.kernels.brute_force import attention_matrix, statistics

ROWS = (1, 63, ROW_BLOCK - 1, ROW_BLOCK, ROW_BLOCK + 1)
FIRST_ROWS = (0, 1, 37)
HEADS = ((1, 1), (4, 1), (4, 4), (8, 2))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# fp32 sums of up to 490 probabilities
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
# a logit is known to about this much: a count may differ by the entries that are as close to the threshold
LOGIT_ERROR = 1e-4
# keys, rows, KV heads, GQA group, head dim
CASES = {
    "one row": (63, 1, 2, 1, 32),
    "one row of a group": (100, 1, 1, 7, 80),
    "every row": (37, 37, 2, 4, 32),
    "less than a tile": (63, 37, 2, 1, 80),
    "the default": (300, 64, 1, 4, 128),
    "more than a tile": (300, 70, 1, 7, 128),
    "more than a tile, one head": (100, 70, 2, 1, 128),
}


def draw(keys: int, rows: int, kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, device: torch.device):
    generator = torch.Generator().manual_seed(keys * 1000 + rows)
    query = 2 * torch.randn(group * kv_heads, rows, head_dim, generator=generator)
    key = torch.randn(kv_heads, keys, head_dim, generator=generator)
    visual = torch.rand(keys, generator=generator) < 0.6
    return query.to(device, dtype), key.to(device, dtype), visual.to(device)


def draw_exact(query_heads: int, kv_heads: int, rows: int, first_row: int, dtype: torch.dtype = torch.float32):
    """Multiples of 1/4: logits are exact in any precision, so that counts must be exact too."""
    generator = torch.Generator().manual_seed(rows * 1000 + first_row)
    query = torch.randint(-4, 5, (query_heads, rows, 16), generator=generator) / 4
    key = torch.randint(-4, 5, (kv_heads, first_row + rows, 16), generator=generator) / 4
    return query.to(dtype), key.to(dtype)


def assert_close(found: torch.Tensor, expected: np.ndarray) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu().double(), torch.from_numpy(expected), **TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("keys", "rows", "kv_heads", "group", "head_dim"), CASES.values(), ids=CASES)
def test_it_is_the_attention_matrix_summed(keys, rows, kv_heads, group, head_dim, dtype, kernels, device) -> None:
    query, key, visual = draw(keys, rows, kv_heads, group, head_dim, dtype, device)
    scaling, threshold = head_dim**-0.5, 0.02
    found = kernels.post_vision_statistics(query, key, keys - rows, scaling, threshold, visual)
    matrix = attention_matrix(query.cpu(), key.cpu(), keys - rows, scaling)
    columns, fewest = statistics(matrix, kv_heads, threshold * (1 + LOGIT_ERROR))
    _, most = statistics(matrix, kv_heads, threshold * (1 - LOGIT_ERROR))
    assert_close(found.column_sums, columns)
    assert found.counts.dtype == torch.int64
    assert all(fewest <= found.counts.cpu().numpy())
    assert all(found.counts.cpu().numpy() <= most)
    seen = visual.cpu().numpy()
    assert_close(found.visual_mass, matrix[..., seen].sum(axis=-1))
    assert_close(found.text_mass, matrix[..., ~seen].sum(axis=-1))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("first_row", FIRST_ROWS)
@pytest.mark.parametrize(("query_heads", "kv_heads"), HEADS)
def test_exact_logits_are_counted_exactly(rows: int, first_row: int, query_heads: int, kv_heads: int) -> None:
    query, key = draw_exact(query_heads, kv_heads, rows, first_row)
    matrix = attention_matrix(query, key, first_row, 0.5)
    for threshold in (0.01, 0.3, 1.0):
        found = post_vision_statistics(query, key, first_row, 0.5, threshold)
        columns, counts = statistics(matrix, kv_heads, threshold)
        assert_close(found.column_sums, columns)
        assert found.counts.tolist() == counts.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [0.01, 1.0])
def test_both_twins_count_exact_logits_alike(threshold, dtype, kernels, device) -> None:
    query, key = draw_exact(8, 2, 70, 37, dtype)
    _, expected = statistics(attention_matrix(query, key, 37, 0.25), 2, threshold)
    found = kernels.post_vision_statistics(query.to(device), key.to(device), 37, 0.25, threshold)
    assert found.counts.tolist() == expected.tolist()


def test_masses_are_computed_when_asked_for_and_change_nothing_else(kernels: Kernels, device: torch.device) -> None:
    query, key, visual = draw(100, 37, 2, 4, 32, torch.float32, device)
    plain = kernels.post_vision_statistics(query, key, 63, 0.3, 0.1)
    assert (plain.visual_mass, plain.text_mass) == (None, None)
    asked = kernels.post_vision_statistics(query, key, 63, 0.3, 0.1, visual)
    assert torch.equal(plain.column_sums, asked.column_sums)
    assert torch.equal(plain.counts, asked.counts)


@pytest.mark.parametrize("all_visual", [True, False])
def test_a_part_without_keys_has_no_mass(all_visual: bool, kernels: Kernels, device: torch.device) -> None:
    query, key, _ = draw(100, 37, 2, 4, 32, torch.float32, device)
    visual = torch.full((100,), all_visual, device=device)
    found = kernels.post_vision_statistics(query, key, 63, 0.3, 0.1, visual)
    whole, empty = (found.visual_mass, found.text_mass) if all_visual else (found.text_mass, found.visual_mass)
    assert not empty.any()
    torch.testing.assert_close(whole, torch.ones_like(whole))


def test_more_rows_than_a_launch(kernels: Kernels, device: torch.device) -> None:
    query, key, visual = draw(530, 520, 1, 2, 16, torch.float32, device)
    found = kernels.post_vision_statistics(query, key, 10, 0.25, 0.1, visual)
    matrix = attention_matrix(query.cpu(), key.cpu(), 10, 0.25)
    assert_close(found.column_sums, statistics(matrix, 1, 0.1)[0])
    assert_close(found.visual_mass, matrix[..., visual.cpu().numpy()].sum(axis=-1))


def test_more_blocks_of_keys_than_are_merged_at_once(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    kernel = pytest.importorskip("shared.kernels.triton.statistics", reason="the extra `kernels` is not installed")
    query, key, visual = draw(620, 20, 1, 2, 32, torch.float32, device)
    expected = post_vision_statistics(query, key, 600, 0.25, 0.1, visual)
    monkeypatch.setattr(kernel, "MERGE_BLOCKS", 2)
    found = kernel.post_vision_statistics(query, key, 600, 0.25, 0.1, visual)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, **TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_read_beside_the_rows_and_keys(dtype, kernels: Kernels, device: torch.device) -> None:
    """Views of the memory that a model and its cache leave behind; all else in it is NaN."""
    query, key, visual = draw(63, 37, 2, 4, 80, dtype, device)
    around_query = query.new_full((100, 8, 96), torch.nan)
    around_query[63:, :, :80] = query.transpose(0, 1)
    around_key = key.new_full((3, 100, 96), torch.nan)
    around_key[:2, :63, :80] = key
    views = around_query[63:, :, :80].transpose(0, 1), around_key[:2, :63, :80]
    expected = kernels.post_vision_statistics(query, key, 26, 0.1, 0.1, visual)
    found = kernels.post_vision_statistics(*views, 26, 0.1, 0.1, visual)
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    assert all(torch.isfinite(numbers).all() for numbers in found)


def test_it_is_deterministic(kernels: Kernels, device: torch.device) -> None:
    query, key, visual = draw(300, 70, 1, 4, 32, torch.float32, device)
    first, second = (kernels.post_vision_statistics(query, key, 230, 0.3, 0.01, visual) for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


def test_every_row_spreads_a_mass_of_one_per_query_head(kernels: Kernels, device: torch.device) -> None:
    query, key, _ = draw(85, 65, 2, 4, 32, torch.float32, device)
    columns = kernels.post_vision_statistics(query, key, 20, 1.0, 0.5).column_sums.cpu()
    torch.testing.assert_close(columns.sum(dim=1), torch.full((2,), 65.0 * 4), atol=1e-2, rtol=0)


def test_a_threshold_of_one_counts_the_maxima_with_their_ties(kernels: Kernels, device: torch.device) -> None:
    query = torch.ones(1, 1, 4, device=device)
    key = torch.tensor([[[1.0] * 4, [0.5] * 4, [1.0] * 4]], device=device)
    assert kernels.post_vision_statistics(query, key, 2, 1.0, 1.0).counts.tolist() == [2]


def test_large_logits_do_not_overflow(kernels: Kernels, device: torch.device) -> None:
    query, key = torch.full((1, 2, 4), 1e4), torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0)) * 1e4
    found = kernels.post_vision_statistics(query.to(device), key.to(device), 2, 1.0, 0.01)
    assert torch.isfinite(found.column_sums).all()
    assert found.counts.tolist() == [2]


@pytest.mark.parametrize(("threshold", "reached"), [(0.5, 1), (1e-20, 2), (1e-30, 3)])
def test_entries_that_underflow_are_neither_lost_nor_counted(threshold, reached, kernels, device) -> None:
    """Logits 25 apart: beyond the fourth, exp() of the difference to the first is no normal number of fp32."""
    query = torch.ones(1, 3, 1, device=device)
    key = -25 * torch.arange(20.0, device=device)[None, :, None]
    found = kernels.post_vision_statistics(query, key, 17, 1.0, threshold)
    assert found.counts.tolist() == [3 * reached]
    expected = 3 * torch.exp(-25 * torch.arange(20.0))
    torch.testing.assert_close(found.column_sums[0].cpu(), expected, atol=1e-25, rtol=1e-5)


def test_rows_that_are_not_the_last_ones_are_a_bug(kernels: Kernels, device: torch.device) -> None:
    query, key, _ = draw(8, 4, 1, 1, 16, torch.float32, device)
    for first_row in (3, 5):
        with pytest.raises(AssertionError):
            kernels.post_vision_statistics(query, key, first_row, 1.0, 0.5)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_inputs_are_computed_in_single(dtype: torch.dtype) -> None:
    query, key = draw_exact(4, 2, 70, 10, dtype)
    expected = post_vision_statistics(query.float(), key.float(), 10, 0.25, 0.01)
    found = post_vision_statistics(query, key, 10, 0.25, 0.01)
    assert torch.equal(found.column_sums, expected.column_sums)
    assert torch.equal(found.counts, expected.counts)


class Recorder:
    """Attends plainly and keeps the statistics of the rows from `first` on."""

    def __init__(self, first: int) -> None:
        self.first, self.found = first, []

    def attend(self, layer, query, key, value, mask, scaling):
        rows = query[0, :, self.first :]
        self.found.append(post_vision_statistics(rows, key[0], self.first, scaling, 0.01))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2)


@torch.inference_mode()
def test_it_matches_the_attention_matrices_of_the_model_itself() -> None:
    """Eager transformers returns them; our hook must see the same queries and keys."""
    tokens, first = 50, 33
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    ids = torch.randint(0, 64, (1, tokens), generator=torch.Generator().manual_seed(1))
    matrices, recorder = [], Recorder(first)
    for attention in ("eager", PREFILL_ATTENTION):
        torch.manual_seed(2)
        model = LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()
        if attention == "eager":
            matrices = model(input_ids=ids, output_attentions=True).attentions
        else:
            model(input_ids=ids, vlc=recorder)
    for matrix, found in itertools.zip_longest(matrices, recorder.found):
        columns, counts = statistics(matrix[0, :, first:].double().numpy(), 2, 0.01)
        torch.testing.assert_close(found.column_sums.double(), torch.from_numpy(columns), atol=1e-4, rtol=1e-4)
        # the two computations round differently: an entry at the threshold itself may fall on either side
        assert (found.counts - torch.from_numpy(counts)).abs().max() <= 1
