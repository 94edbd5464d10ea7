"""The statistics of the observed rows against the full attention matrix."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shared.kernels.reference.statistics import ROW_BLOCK, post_vision_statistics
from shared.model.attention import PREFILL_ATTENTION
from tests.kernels.brute_force import attention_matrix, statistics

ROWS = (1, ROW_BLOCK - 1, ROW_BLOCK, ROW_BLOCK + 1, 100)
FIRST_ROWS = (0, 1, 37)
HEADS = ((1, 1), (4, 1), (4, 4), (8, 2))
# fp32 sums of at most 100 x 4 probabilities
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}


def draw(query_heads: int, kv_heads: int, rows: int, first_row: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Multiples of 1/4: logits are exact in any precision, so that counts must be exact too."""
    generator = torch.Generator().manual_seed(rows * 1000 + first_row)
    query = torch.randint(-4, 5, (query_heads, rows, 16), generator=generator) / 4
    key = torch.randint(-4, 5, (kv_heads, first_row + rows, 16), generator=generator) / 4
    return query.to(dtype), key.to(dtype)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("first_row", FIRST_ROWS)
@pytest.mark.parametrize(("query_heads", "kv_heads"), HEADS)
def test_it_is_the_sum_over_the_attention_matrix(rows: int, first_row: int, query_heads: int, kv_heads: int) -> None:
    query, key = draw(query_heads, kv_heads, rows, first_row, torch.float32)
    matrix = attention_matrix(query, key, first_row, 0.5)
    for threshold in (0.01, 0.3, 1.0):
        columns, counts = post_vision_statistics(query, key, first_row, 0.5, threshold)
        expected_columns, expected_counts = statistics(matrix, kv_heads, threshold)
        torch.testing.assert_close(columns.double(), torch.from_numpy(expected_columns), **TOLERANCE)
        assert counts.tolist() == expected_counts.tolist()
        assert columns.dtype == torch.float32
        assert counts.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_single(dtype: torch.dtype) -> None:
    query, key = draw(4, 2, 70, 10, dtype)
    expected = post_vision_statistics(query.float(), key.float(), 10, 0.25, 0.01)
    found = post_vision_statistics(query, key, 10, 0.25, 0.01)
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


def test_every_row_spreads_a_mass_of_one_per_query_head() -> None:
    query, key = draw(8, 2, 65, 20, torch.float32)
    columns, _ = post_vision_statistics(query, key, 20, 1.0, 0.5)
    torch.testing.assert_close(columns.sum(dim=1), torch.full((2,), 65.0 * 4), atol=1e-2, rtol=0)


def test_a_threshold_of_one_counts_the_maxima_with_their_ties() -> None:
    query = torch.ones(1, 1, 4)
    key = torch.tensor([[[1.0] * 4, [0.5] * 4, [1.0] * 4]])
    _, counts = post_vision_statistics(query, key, 2, 1.0, 1.0)
    assert counts.tolist() == [2]


def test_large_logits_do_not_overflow() -> None:
    query, key = torch.full((1, 2, 4), 1e4), torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0)) * 1e4
    columns, counts = post_vision_statistics(query, key, 2, 1.0, 0.01)
    assert torch.isfinite(columns).all()
    assert counts.tolist() == [2]


def test_a_slice_of_a_longer_query_may_be_passed() -> None:
    query, key = draw(4, 2, 80, 0, torch.float32)
    sliced = query[:, 30:]
    assert not sliced.is_contiguous()
    expected = post_vision_statistics(sliced.contiguous(), key, 30, 0.5, 0.01)
    found = post_vision_statistics(sliced, key, 30, 0.5, 0.01)
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


def test_rows_that_are_not_the_last_ones_are_a_bug() -> None:
    query, key = draw(1, 1, 4, 4, torch.float32)
    for first_row in (3, 5):
        with pytest.raises(AssertionError):
            post_vision_statistics(query, key, first_row, 1.0, 0.5)


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
    for matrix, (columns, counts) in itertools.zip_longest(matrices, recorder.found):
        expected_columns, expected_counts = statistics(matrix[0, :, first:].double().numpy(), 2, 0.01)
        torch.testing.assert_close(columns.double(), torch.from_numpy(expected_columns), atol=1e-4, rtol=1e-4)
        # the two computations round differently: an entry at the threshold itself may fall on either side
        assert (counts - torch.from_numpy(expected_counts)).abs().max() <= 1
