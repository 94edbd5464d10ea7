"""Packed linear layers compute what plain ones compute."""

from __future__ import annotations

import pytest
import torch

from shared.model.packing import PackedLinear, pack_linears

needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bfloat16 arithmetic"
)


def nested(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(48, 96), torch.nn.GELU())
    return torch.nn.Sequential(inner, torch.nn.Linear(96, 32, bias=False)).to(dtype)


@needs_bf16
@pytest.mark.parametrize("rows", [(1,), (7,), (64,), (3, 1), (2, 5)])
def test_the_products_are_the_same_bits(rows: tuple[int, ...]) -> None:
    plain, packed = nested(torch.bfloat16), nested(torch.bfloat16)
    pack_linears(packed)
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == 2
    given = torch.randn(*rows, 48).bfloat16()
    with torch.inference_mode():
        assert torch.equal(plain(given), packed(given))


@needs_bf16
def test_only_bfloat16_is_packed() -> None:
    model = nested(torch.float32)
    pack_linears(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_where_the_cpu_cannot_all_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = nested(torch.bfloat16)
    pack_linears(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
