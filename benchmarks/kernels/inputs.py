"""Random KV of several layers, in blocks and in dense tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.kernels.config import KernelsConfig

# Kept lengths of KV heads differ by this factor around their mean, as sparsity budgets make them.
SPREAD = (0.5, 1.5)

LayerKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""The arguments of a layer's kernels: K blocks, V blocks, block table, lengths, slots."""


@dataclass(frozen=True, kw_only=True)
class BlockCache:
    """The KV of a batch in one shuffled pool.

    Attributes:
        key_blocks: [num_blocks, block_size, head_dim], of all layers.
        value_blocks: As `key_blocks`.
        block_table: [layers, batch, num_kv_heads, max_blocks] int32.
        lengths: [layers, batch, num_kv_heads] int32.
        slots: [batch] int32, 0, 1, 2 ...
        max_length: The largest of the lengths.
    """

    key_blocks: torch.Tensor
    value_blocks: torch.Tensor
    block_table: torch.Tensor
    lengths: torch.Tensor
    slots: torch.Tensor
    max_length: int

    def layer(self, layer: int) -> LayerKV:
        """One layer of it."""
        return self.key_blocks, self.value_blocks, self.block_table[layer], self.lengths[layer], self.slots

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that attention over all layers reads."""
        row_bytes = self.key_blocks.shape[2] * self.key_blocks.element_size()
        return 2 * int(self.lengths.sum()) * row_bytes


def full_lengths(config: KernelsConfig) -> torch.Tensor:
    """[layers, batch, num_kv_heads], everything kept."""
    return torch.full((config.layers, config.batch, config.kv_heads), config.prompt, dtype=torch.int32)


def kept_lengths(config: KernelsConfig) -> torch.Tensor:
    """[layers, batch, num_kv_heads], ragged around the retention."""
    factors = torch.empty(config.layers, config.batch, config.kv_heads).uniform_(*SPREAD)
    return (factors * config.prompt * config.retention).round().clamp(min=1).to(torch.int32)


def block_cache(config: KernelsConfig, lengths: torch.Tensor) -> BlockCache:
    """Random KV of the given lengths."""
    needed = -(-lengths // config.block_size)
    total, widest = int(needed.sum()), int(needed.max())
    first = (needed.flatten().cumsum(0) - needed.flatten()).view(needed.shape)
    # entries beyond a length name somebody else's block; nobody reads them
    places = (first[..., None] + torch.arange(widest)).clamp(max=total - 1)
    shape = (total, config.block_size, config.head_dim)
    return BlockCache(
        key_blocks=torch.randn(shape, dtype=config.torch_dtype, device=config.device),
        value_blocks=torch.randn(shape, dtype=config.torch_dtype, device=config.device),
        block_table=torch.randperm(total)[places].to(config.device, torch.int32),
        lengths=lengths.to(config.device),
        slots=torch.arange(config.batch, dtype=torch.int32, device=config.device),
        max_length=int(lengths.max()),
    )


def dense(config: KernelsConfig, *shape: int) -> list[torch.Tensor]:
    """One random tensor per layer."""
    return [torch.randn(shape, dtype=config.torch_dtype, device=config.device) for _ in range(config.layers)]
