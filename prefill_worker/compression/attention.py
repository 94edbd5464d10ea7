"""One layer's attention as the prefill pass computes it: what statistics are measured on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.rotation import Rotation
from prefill_worker.compression.rows import Rows, run_at_the_end
from shared.kernels.dispatch import kernels_for
from shared.kernels.reference.statistics import FAINTEST_WEIGHT, PostVisionStatistics

# Attention rows that are materialised at once: 8 MiB with 8 query heads and 2,000 keys.
BLOCK_ROWS = 128


@dataclass(eq=False, kw_only=True)
class LayerAttention:
    """Lives as long as its layer's turn in the pass; what two statistics need is computed once.

    Attributes:
        query: [num_query_heads, num_tokens, head_dim], rotated.
        key: [num_kv_heads, num_tokens, head_dim], rotated.
        value: As `key`.
        scaling: Factor of the logits.
        rotation: How queries and keys were rotated; None when the model rotates nothing.
        mask: [num_tokens, num_tokens] bool, which keys each query sees; None where these are itself and all before it.
    """

    prompt: PromptShape
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    rotation: Rotation | None = None
    mask: torch.Tensor | None = None
    _sweeps: dict[range, tuple[float, PostVisionStatistics]] = field(default_factory=dict)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query.shape[0] // self.key.shape[0]

    def sweep(self, rows: range, threshold: float) -> PostVisionStatistics:
        """Column sums and kept entries of the rows at the prompt's end; see the kernel."""
        known = self._sweeps.get(rows)
        if known is not None and known[0] == threshold:
            return known[1]
        found = self._sweep(rows, threshold) if self.mask is None else self._masked_sweep(rows, threshold)
        self._sweeps[rows] = threshold, found
        return found

    def column_sums(self, rows: Rows) -> torch.Tensor:
        """Attention that each key receives from the rows, [num_kv_heads, num_tokens] fp32, summed over the group."""
        if isinstance(rows, range):
            # whatever the threshold of a sweep that is known already: it does not touch these sums
            return self._sweeps[rows][1].column_sums if rows in self._sweeps else self.sweep(rows, 1.0).column_sums
        # the kernel takes a fifth of the time, but knows only rows at the end
        recent = run_at_the_end(rows, self.prompt.num_tokens)
        sums = self.key.new_zeros(self.key.shape[:2], dtype=torch.float32)
        if recent:
            sums += self.column_sums(recent)
        for _, weights in self.blocks(rows[: len(rows) - len(recent)]):
            seen = weights.shape[2]
            sums[:, :seen] += weights.sum(dim=1).view(-1, self.group, seen).sum(dim=1)
        return sums

    def blocks(self, rows: Rows) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The attention matrix of the rows, `BLOCK_ROWS` at a time.

        Yields:
            Positions [block] int64, and weights [num_query_heads, block, keys up to the last one that is seen], fp32.
        """
        for start in range(0, len(rows), BLOCK_ROWS):
            chosen = torch.tensor(rows[start : start + BLOCK_ROWS], device=self.key.device)
            yield chosen, self._weights(chosen)

    def weights(self, rows: Rows) -> torch.Tensor:
        """The attention matrix of few rows at once, [num_query_heads, rows, num_tokens] fp32."""
        whole = self.key.new_zeros(len(self.query), len(rows), self.prompt.num_tokens, dtype=torch.float32)
        done = 0
        for positions, weights in self.blocks(rows):
            whole[:, done : done + len(positions), : weights.shape[2]] = weights
            done += len(positions)
        return whole

    def _sweep(self, rows: range, threshold: float) -> PostVisionStatistics:
        kernels = kernels_for(self.key.device)
        return kernels.post_vision_statistics(
            self.query[:, rows.start :], self.key, rows.start, self.scaling, threshold
        )

    def _masked_sweep(self, rows: range, threshold: float) -> PostVisionStatistics:
        """As the kernel, which knows no masks: what is not seen has no weight, and does not count."""
        sums = self.key.new_zeros(self.key.shape[:2], dtype=torch.float32)
        counts = torch.zeros(len(self.query), dtype=torch.long, device=self.key.device)
        for _, weights in self.blocks(rows):
            sums += weights.sum(dim=1).view(-1, self.group, weights.shape[2]).sum(dim=1)
            least = weights.amax(dim=2, keepdim=True) * max(threshold, FAINTEST_WEIGHT)
            counts += (weights >= least).sum(dim=(1, 2))
        return PostVisionStatistics(sums, counts, None, None)

    def _weights(self, positions: torch.Tensor) -> torch.Tensor:
        keys = int(positions[-1]) + 1 if self.mask is None else self.key.shape[1]
        head_dim = self.query.shape[2]
        queries = self.query[:, positions].float().reshape(len(self.key), -1, head_dim)
        logits = queries @ self.key[:, :keys].float().mT * self.scaling
        logits = logits.view(len(self.query), len(positions), keys)
        if self.mask is None:
            hidden = torch.arange(keys, device=positions.device) > positions[:, None]
        else:
            hidden = ~self.mask[positions]
        return logits.masked_fill_(hidden, -torch.inf).softmax(dim=-1)
