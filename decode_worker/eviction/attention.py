"""The attention of a step in which some sequence evicts by attention, or reads other rows than all of its layer's.

All others go through the pool's own kernel as ever, and so does each sequence in every layer where it reads everything.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Generic, Protocol, TypeVar

import torch

from decode_worker.eviction.ledger import RowLedger
from shared.model.attention import LayerHook


class Ruled(Protocol):
    """A sequence's KV; `eviction` is None where nothing is dropped and everything is read."""

    eviction: RowLedger | None


SomeKV_contra = TypeVar("SomeKV_contra", bound=Ruled, contravariant=True)
SomeKV = TypeVar("SomeKV", bound=Ruled)


class StepAttention(LayerHook, Protocol):
    """A pool's own attention of one step."""

    def part(self, members: Sequence[int]) -> StepAttention:
        """The same step for some of its batch, by their places in it."""

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Writes each sequence's new row, [batch, num_kv_heads, head_dim], and attends to nothing."""


class RowAccess(Protocol[SomeKV_contra]):
    """Rows of one sequence of the running batch."""

    def keys(self, kv: SomeKV_contra, layer: int, number: int) -> torch.Tensor:
        """K of a layer's first rows, [num_kv_heads, number, head_dim]; undefined where a head has fewer."""

    def rows(self, kv: SomeKV_contra, layer: int, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of some rows of a layer, each as `chosen` [num_kv_heads, number] int64 and head_dim."""


class RowMemory(RowAccess[SomeKV_contra], Protocol[SomeKV_contra]):
    """Rows that may be rewritten."""

    def write(
        self, kv: SomeKV_contra, layer: int, chosen: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Overwrites what `rows` reads."""


class RuledAttention(Generic[SomeKV]):
    """The `LayerHook` of one step.

    Args:
        dense: The step without rules.
        batch: One entry per query.
        access: To the rows of the batch.
    """

    def __init__(self, dense: StepAttention, batch: Sequence[SomeKV], access: RowAccess[SomeKV]) -> None:
        self._dense = dense
        self._size = len(batch)
        self._access = access
        self._ruled = [(member, kv, kv.eviction) for member, kv in enumerate(batch) if kv.eviction is not None]
        self._chosen: dict[int, torch.Tensor | None] = {}
        self._parts: dict[tuple[int, ...], StepAttention] = {}
        self._new: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """See `LayerHook.attend`; one query per sequence."""
        self._new[layer] = (key, value)
        lenders = self._lenders(layer)
        sparse = {
            member: (kv, chosen)
            for member, kv, ledger in self._ruled
            if not ledger.rule.watches(layer) and (chosen := self._chosen.get(member)) is not None
        }
        out = self._read_all(layer, query, key, value, scaling, skipped={*sparse, *lenders})
        for member, (kv, chosen) in sparse.items():
            self._part((member,)).append(layer, key[member, None, :, 0], value[member, None, :, 0])
            keys, values = self._access.rows(kv, layer, chosen)
            out[member, 0] = _attend(query[member, :, 0], keys, values, scaling)
        for lender in set(lenders.values()):
            members = tuple(member for member, other in lenders.items() if other == lender)
            out[list(members)] = self._read_lender(lender, members, query, scaling)
        for member, kv, ledger in self._ruled:
            if ledger.rule.watches(layer):
                self._chosen[member] = self._watch(kv, ledger, layer, query[member, :, 0], scaling)
        return out

    def _read_all(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        *,
        skipped: Collection[int],
    ) -> torch.Tensor:
        """Attention of all others; the rows of those that are skipped are undefined."""
        if not skipped:
            return self._dense.attend(layer, query, key, value, None, scaling)
        others = tuple(member for member in range(self._size) if member not in skipped)
        out = query.new_empty(self._size, 1, *query.shape[1::2])
        if others:
            chosen = list(others)
            part = self._part(others)
            out[chosen] = part.attend(layer, query[chosen], key[chosen], value[chosen], None, scaling)
        return out

    def _lenders(self, layer: int) -> dict[int, int]:
        """By its place in the batch, the layer whose rows a sequence reads in this one; without those that read its."""
        lenders = ((member, ledger.rule.lender(layer)) for member, _, ledger in self._ruled)
        return {member: lender for member, lender in lenders if lender is not None}

    def _read_lender(self, lender: int, members: tuple[int, ...], query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention of some of the batch over the rows of a layer below."""
        chosen, (key, value) = list(members), self._new[lender]
        # its new rows are appended once more, to the same places: these are the same bytes
        return self._part(members).attend(lender, query[chosen], key[chosen], value[chosen], None, scaling)

    def _part(self, members: tuple[int, ...]) -> StepAttention:
        if members not in self._parts:
            self._parts[members] = self._dense.part(members)
        return self._parts[members]

    def _watch(
        self, kv: SomeKV, ledger: RowLedger, layer: int, query: torch.Tensor, scaling: float
    ) -> torch.Tensor | None:
        present = torch.from_numpy(ledger.lengths[layer] + 1).to(query.device)
        keys = self._access.keys(kv, layer, int(ledger.lengths[layer].max()) + 1)
        return ledger.observe(layer, received(query, keys, present, scaling))


def received(query: torch.Tensor, keys: torch.Tensor, present: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention that each row gets from one token, summed over the group, [num_kv_heads, rows] fp32.

    Args:
        query: [num_query_heads, head_dim].
        keys: [num_kv_heads, rows, head_dim].
        present: [num_kv_heads] int64, rows of each head; what lies behind them gets 0.
        scaling: Factor of the logits.
    """
    logits = query.float().unflatten(0, (len(keys), -1)) @ keys.float().mT * scaling
    missing = torch.arange(keys.shape[1], device=keys.device) >= present[:, None]
    return logits.masked_fill_(missing[:, None], -torch.inf).softmax(dim=-1).sum(dim=1)


def _attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention of one token over the rows of each KV head, [num_query_heads, head_dim]."""
    weights = (query.float().unflatten(0, (len(keys), -1)) @ keys.float().mT * scaling).softmax(dim=-1)
    return (weights @ values.float()).flatten(0, 1).to(query.dtype)
