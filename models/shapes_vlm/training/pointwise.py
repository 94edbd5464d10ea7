"""Small element-wise functions, fused by torch.compile where a C++ compiler is at hand.

Only these are compiled: they are bound by memory, while the matrix products are fast as they are.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-split layout; cos and sin broadcast over heads."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@dataclass(frozen=True, kw_only=True)
class Pointwise:
    """The element-wise functions of a forward pass, plain by default."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = _rms_norm
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor] = _layer_norm
    swiglu: Callable[[Tensor], Tensor] = _swiglu
    quick_gelu: Callable[[Tensor], Tensor] = _quick_gelu
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = _rotate


PLAIN = Pointwise()


def fused() -> Pointwise:
    """The same functions, compiled where a C++ compiler is at hand."""
    if shutil.which("g++") is None:
        return PLAIN
    functions = {field.name: torch.compile(getattr(PLAIN, field.name), dynamic=True) for field in fields(PLAIN)}
    return Pointwise(**functions)
