"""Merging dropped tokens into kept ones: who joins whom, and what each group becomes.

All sums are in fp32, in ascending order of position: the same groups give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

# Rows of the similarity matrix that exist at once, per KV head.
BLOCK_ROWS = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """A kept token and the dropped ones that join it, for each kept token; `chosen`'s order: head after head.

    Attributes:
        order: [num_members] int64, the tokens of all groups, group after group, each ascending; they count through
            all heads.
        sizes: [num_kept] int64, members of each group, the kept token among them.
    """

    order: torch.Tensor
    sizes: torch.Tensor

    def members(self, values: torch.Tensor) -> torch.Tensor:
        """[num_members, ..] fp32 of `values` [num_kv_heads, num_tokens, ..]."""
        return values.flatten(0, 1)[self.order].float()

    def sums(self, members: torch.Tensor) -> torch.Tensor:
        """Sum of each group, [num_kept, ..], of `members` [num_members, ..]."""
        # not index_add: on a GPU its order of additions differs from run to run
        return torch.segment_reduce(members, "sum", lengths=self.sizes, axis=0)

    def means(self, members: torch.Tensor) -> torch.Tensor:
        """Mean of each group, [num_kept, dim], of `members` [num_members, dim]."""
        return self.sums(members) / self.sizes[:, None]

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Each group's value for all its members, [num_members, ..] of `values` [num_kept, ..]."""
        return values.repeat_interleave(self.sizes, dim=0)


def groups_of(chosen: torch.Tensor, target: torch.Tensor, joins: torch.Tensor) -> Groups:
    """The groups that dropped tokens form with the kept tokens they join.

    Args:
        chosen: [num_kv_heads, num_tokens] bool, the kept tokens.
        target: [num_kv_heads, num_tokens] int64, position of the kept token of the same head that a token joins;
            read only where a token is dropped and joins.
        joins: [num_kv_heads, num_tokens] bool; dropped tokens that do not join leave no trace.
    """
    num_heads, num_tokens = chosen.shape
    own = torch.arange(num_heads * num_tokens, device=chosen.device)
    first = own[::num_tokens, None]
    leaders = torch.where(chosen, own.view(num_heads, num_tokens), first + target).flatten()
    members = (chosen | joins).flatten().nonzero().flatten()
    order = members[leaders[members].argsort(stable=True)]
    sizes = leaders[members].bincount(minlength=num_heads * num_tokens)[chosen.flatten()]
    return Groups(order=order, sizes=sizes)


def nearest(targets: torch.Tensor, runs: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token the nearest target by position, ties to the lower one.

    Args:
        targets: [num_kv_heads, num_tokens] bool.
        runs: [num_kv_heads, num_tokens] int64, equal for neighbours that may join; None lets all.

    Returns:
        Its position [num_kv_heads, num_tokens] int64, any where there is none; and whether there is one, bool.
    """
    num_tokens = targets.shape[1]
    runs = torch.zeros_like(targets, dtype=torch.long) if runs is None else runs
    places = torch.arange(num_tokens, device=targets.device)
    before = torch.where(targets, places, -1).cummax(dim=1).values
    after = torch.where(targets, places, num_tokens).flip(1).cummin(dim=1).values.flip(1)
    earlier, later = before.clamp(min=0), after.clamp(max=num_tokens - 1)
    has_before = (before >= 0) & (runs.gather(1, earlier) == runs)
    has_after = (after < num_tokens) & (runs.gather(1, later) == runs)
    takes_before = has_before & (~has_after | (places - before <= after - places))
    return torch.where(takes_before, earlier, later), has_before | has_after


def most_similar(key: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token the kept one of its head whose key has the largest cosine with its own, ties to the lower one.

    Args:
        key: [num_kv_heads, num_tokens, head_dim].
        chosen: [num_kv_heads, num_tokens] bool, the kept tokens, at least one per head.

    Returns:
        Its position [num_kv_heads, num_tokens] int64, and the cosine [num_kv_heads, num_tokens] fp32.
    """
    units = functional.normalize(key.float(), dim=-1)
    found = [_most_similar(rows, kept) for rows, kept in zip(units, chosen, strict=True)]
    positions, cosines = zip(*found, strict=True)
    return torch.stack(positions), torch.stack(cosines)


def _most_similar(units: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    candidates = kept.nonzero().flatten()
    best = [(rows @ units[candidates].T).max(dim=1) for rows in units.split(BLOCK_ROWS)]
    return candidates[torch.cat([block.indices for block in best])], torch.cat([block.values for block in best])
