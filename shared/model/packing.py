"""Linear layers whose weights lie in the order in which the CPU multiplies them.

A decode step multiplies a handful of rows by every weight. oneDNN reorders a plain weight on every such call, which
takes a third of the time; here it is done once. The products are the same bit by bit.
"""

from __future__ import annotations

import logging

import torch

log = logging.getLogger(__name__)

# Rows for which the order is chosen; it stays good from 1 to 64.
TYPICAL_ROWS = 16


class PackedLinear(torch.nn.Module):
    """Takes the place of a bfloat16 `torch.nn.Linear` that is never trained."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), TYPICAL_ROWS)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        return torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")


def pack_linears(model: torch.nn.Module) -> None:
    """Packs every bfloat16 linear layer on the CPU in place; others stay, as all do where oneDNN cannot."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        log.info("linear layers stay unpacked: this CPU has no bfloat16 arithmetic")
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and _packable(child.weight):
                setattr(parent, name, PackedLinear(child))


def _packable(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype is torch.bfloat16
