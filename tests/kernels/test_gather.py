"""Gathering kept rows into a parcel body: both twins against a loop over the layout's sections."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.kernels.dispatch import Kernels
from shared.kernels.reference.gather import gather_rows
from shared.kv.layout import ITEM_BYTES, KVLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU = torch.device("cpu")
# layer-major counts of two KV heads
COUNTS = {
    "even": [5, 5, 5, 5],
    "ragged, some empty": [0, 63, 100, 1, 0, 0, 129, 64],
    "one head": [0, 1],
    "nothing": [0, 0, 0, 0],
}


def draw_layers(counts: list[int], num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
    """K and V per layer [num_heads, 130, head_dim]."""
    generator = torch.Generator().manual_seed(head_dim)
    drawn = torch.randn(2, len(counts) // num_heads, num_heads, 130, head_dim, generator=generator).to(device, dtype)
    return list(drawn[0]), list(drawn[1])


def draw_indices(counts: list[int]) -> list[int]:
    chance = random.Random(sum(counts))
    return [token for count in counts for token in sorted(chance.sample(range(130), count))]


def expected_body(keys, values, indices: list[int], counts: list[int]) -> torch.Tensor:
    """Row by row, at the offsets that the layout gives."""
    num_heads, _, head_dim = keys[0].shape
    dtype = str(keys[0].dtype).removeprefix("torch.")
    layout = KVLayout(num_layers=len(keys), num_kv_heads=num_heads, head_dim=head_dim, dtype=dtype)
    body = torch.full((layout.body_bytes(counts) // ITEM_BYTES[dtype] // head_dim, head_dim), torch.nan).to(keys[0])
    tokens = iter(indices)
    for section in layout.sections(counts):
        row = section.key_offset // layout.row_bytes
        below = (section.value_offset - section.key_offset) // layout.row_bytes
        for head, kept in enumerate(section.rows):
            for _ in range(kept):
                token = next(tokens)
                body[row] = keys[section.layer][head, token]
                body[row + below] = values[section.layer][head, token]
                row += 1
    return body


def gather(kernels: Kernels, keys, values, counts: list[int]) -> None:
    indices = draw_indices(counts)
    expected = expected_body(keys, values, indices, counts)
    out = torch.full_like(expected, torch.nan)
    kernels.gather_rows(keys, values, torch.tensor(indices, dtype=torch.int32, device=out.device), counts, out)
    torch.testing.assert_close(out, expected, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 80, 128])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_it_is_the_body_that_the_layout_describes(counts, head_dim, dtype, kernels, device) -> None:
    gather(kernels, *draw_layers(counts, 2, head_dim, DTYPES[dtype], device), counts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_may_lie_beside_each_other(dtype, kernels, device) -> None:
    """[tokens, heads, dim] seen as [heads, tokens, dim]."""
    counts = COUNTS["ragged, some empty"]
    keys, values = draw_layers(counts, 2, 72, DTYPES[dtype], device)
    keys, values = ([layer.transpose(0, 1).contiguous().transpose(0, 1) for layer in half] for half in (keys, values))
    assert not keys[0].is_contiguous()
    gather(kernels, keys, values, counts)


def test_rows_may_be_cut_at_odd_places(kernels: Kernels, device: torch.device) -> None:
    """Addresses and strides that two bytes divide and no more."""
    counts = COUNTS["even"]
    keys, values = draw_layers(counts, 2, 33, torch.bfloat16, device)
    gather(kernels, [layer[..., 1:9] for layer in keys], [layer[..., 3:11] for layer in values], counts)


@given(
    counts=st.lists(st.integers(0, 9), min_size=3, max_size=12).filter(lambda counts: len(counts) % 3 == 0),
    seed=st.integers(0, 5),
)
def test_the_reference_is_a_loop_over_rows(counts, seed) -> None:
    keys, values = draw_layers(counts, 3, 8 + seed, torch.float32, CPU)
    indices = draw_indices(counts)
    expected = expected_body(keys, values, indices, counts)
    out = torch.empty_like(expected)
    gather_rows(keys, values, torch.tensor(indices, dtype=torch.int32), counts, out)
    assert torch.equal(out, expected)


def refuse(kernels: Kernels, keys, values, counts: list[int], num_indices: int, out: torch.Tensor, text: str) -> None:
    indices = torch.zeros(num_indices, dtype=torch.int32, device=out.device)
    with pytest.raises(ValueError, match=text):
        kernels.gather_rows(keys, values, indices, counts, out)


def test_layers_of_different_strides_are_refused(kernels: Kernels, device: torch.device) -> None:
    keys, values = draw_layers([1, 1, 1, 1], 2, 8, torch.float32, device)
    out = torch.empty(8, 8, device=device)
    other = values[1].transpose(0, 1).contiguous().transpose(0, 1)
    refuse(kernels, keys, [values[0], other], [1, 1, 1, 1], 4, out, "strides")
    refuse(kernels, keys, [values[0], values[1][:, :-1]], [1, 1, 1, 1], 4, out, "shape")
    refuse(kernels, keys, [values[0], values[1].half()], [1, 1, 1, 1], 4, out, "dtype")
    swapped = [layer.transpose(1, 2) for layer in keys]
    refuse(kernels, swapped, swapped, [1, 1, 1, 1], 4, out, "contiguous")


def test_counts_that_contradict_the_tensors_are_refused(kernels: Kernels, device: torch.device) -> None:
    keys, values = draw_layers([1, 1, 1, 1], 2, 8, torch.float32, device)
    out = torch.empty(8, 8, device=device)
    refuse(kernels, keys, values[:1], [1, 1, 1, 1], 4, out, "layers")
    refuse(kernels, [], [], [], 0, out, "layers")
    refuse(kernels, keys, values, [1, 1, 2], 4, out, "counts")
    refuse(kernels, keys, values, [1, 1, 1, 2], 4, out, "indices")
    refuse(kernels, keys, values, [5, 1, 1, -3], 4, out, "indices")
    refuse(kernels, keys, values, [1, 1, 1, 1], 4, out[:6], "output")
    refuse(kernels, keys, values, [1, 1, 1, 1], 4, out.half(), "output")
    refuse(kernels, keys, values, [1, 1, 1, 1], 4, torch.empty(8, 16, device=device)[:, :8], "output")
