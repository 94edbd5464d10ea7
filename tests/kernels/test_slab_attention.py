"""One token's attention against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.kernels.reference.slab_attention import slab_attention
from tests.kernels.brute_force import attention_matrix

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 100])
@pytest.mark.parametrize(("query_heads", "kv_heads"), [(1, 1), (4, 1), (4, 4), (8, 2)])
def test_it_is_attention(dtype: torch.dtype, length: int, query_heads: int, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(query_heads, 16, generator=generator).to(dtype)
    key = torch.randn(kv_heads, length, 16, generator=generator).to(dtype)
    value = torch.randn(kv_heads, length, 16, generator=generator).to(dtype)
    matrix = attention_matrix(query[:, None], key, length - 1, 0.3)[:, 0]
    values = np.repeat(value.double().numpy(), query_heads // kv_heads, axis=0)
    expected = np.einsum("hl,hld->hd", matrix, values)
    out = slab_attention(query, key, value, 0.3)
    assert out.dtype == dtype
    assert out.shape == query.shape
    np.testing.assert_allclose(out.double().numpy(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_it_reads_nothing_beyond_the_rows_it_was_given() -> None:
    slab = torch.full((2, 10, 8), torch.nan)
    slab[:, :4] = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    query = torch.ones(4, 8)
    out = slab_attention(query, slab[:, :4], slab[:, :4], 0.5)
    assert torch.equal(out, slab_attention(query, slab[:, :4].clone(), slab[:, :4].clone(), 0.5))
    assert torch.isfinite(out).all()
