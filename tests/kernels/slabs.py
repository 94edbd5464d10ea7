"""Ragged batches in slabs, with NaN wherever nothing may be read, and what attention makes of them in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tests.kernels.brute_force import attention_matrix

ROOM = 3  # rows behind each slab's length, as NaN


@dataclass(frozen=True, kw_only=True)
class Slabs:
    """The arguments of slab_attention, in its order."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    pool: torch.Tensor
    key_at: torch.Tensor
    value_at: torch.Tensor
    lengths: torch.Tensor
    scaling: float

    def fresh(self) -> tuple[torch.Tensor | float, ...]:
        """The arguments, the pool as a copy: a call writes it."""
        return tuple((self.pool.clone() if name == "pool" else value) for name, value in vars(self).items())

    def alone(self, sequence: int) -> Slabs:
        one = slice(sequence, sequence + 1)
        names = ("query", "key", "value", "key_at", "value_at", "lengths")
        return replace(self, **{name: getattr(self, name)[one] for name in names})

    def appended(self) -> torch.Tensor:
        """The pool with the new rows, written one element at a time by index."""
        pool, head_dim = self.pool.clone(), self.query.shape[-1]
        for sequence, head in np.ndindex(*self.lengths.shape):
            last = int(self.lengths[sequence, head] - 1) * head_dim
            for at, rows in ((self.key_at, self.key), (self.value_at, self.value)):
                begin = int(at[sequence, head]) + last
                pool[begin : begin + head_dim] = rows[sequence, head]
        return pool

    def expected(self) -> np.ndarray:
        """[batch, num_query_heads, head_dim] in float64."""
        pool, (batch, heads), head_dim = self.appended(), self.lengths.shape, self.query.shape[-1]
        group = self.query.shape[1] // heads
        out = np.empty(self.query.shape)
        for sequence, head in np.ndindex(batch, heads):
            length, queries = int(self.lengths[sequence, head]), slice(head * group, (head + 1) * group)
            keys, values = (
                pool[int(at[sequence, head]) :][: length * head_dim].view(length, head_dim)
                for at in (self.key_at, self.value_at)
            )
            query = self.query[sequence, queries]
            matrix = attention_matrix(query[:, None], keys[None], length - 1, self.scaling)
            out[sequence, queries] = matrix[:, 0] @ values.double().numpy()
        return out


def make_slabs(
    lengths: Sequence[Sequence[int]],
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    order: str = "shuffled",
    scaling: float | None = None,
) -> Slabs:
    """Random slabs.

    Args:
        lengths: [batch][num_kv_heads].
        order: How slabs lie in the pool: as the decode worker lays them (`even`), backwards, or `shuffled`.
    """
    generator = torch.Generator().manual_seed(head_dim + group)
    random = torch.Generator().manual_seed(1)
    present = torch.tensor(lengths)
    batch, heads = present.shape
    owners = torch.stack([present, present], dim=1).flatten()  # per sequence K of all heads, then V
    places = {"even": torch.arange, "backwards": lambda n: torch.arange(n).flip(0), "shuffled": _shuffled(random)}
    sizes = (owners + ROOM) * head_dim
    begins, end = torch.empty_like(sizes), 5  # no slab begins at an aligned address
    pool = torch.full((int(sizes.sum()) + end,), torch.nan, dtype=dtype)
    for slab in places[order](len(sizes)).tolist():
        begins[slab] = end
        filled = int(owners[slab] - 1) * head_dim
        pool[end : end + filled] = torch.randn(filled, generator=generator).to(dtype)
        end += int(sizes[slab])
    at = begins.view(batch, 2, heads)

    def normal(count: int) -> torch.Tensor:
        return torch.randn(batch, count, head_dim, generator=generator).to(dtype)

    return Slabs(
        query=normal(heads * group),
        key=normal(heads),
        value=normal(heads),
        pool=pool,
        key_at=at[:, 0],
        value_at=at[:, 1],
        lengths=present,
        scaling=head_dim**-0.5 if scaling is None else scaling,
    )


def _shuffled(generator: torch.Generator):
    return lambda count: torch.randperm(count, generator=generator)
