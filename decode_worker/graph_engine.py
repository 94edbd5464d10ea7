"""Decode steps as CUDA graphs: one per batch size, so that a step costs the GPU's time and not Python's.

transformers launches about ten kernels per layer from Python, which takes longer than a GPU needs to read 7B weights.
A captured graph replays all of them with one call. Its inputs lie in fixed buffers, batches are filled up to the next
captured size with the pool's trash slot, and nothing in it depends on values that only the host knows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Batch
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from decode_worker.engine import draw, forward
from decode_worker.kv_pool.blocks import BlockAttention, BlockPool
from decode_worker.sequence import Sequence

log = logging.getLogger(__name__)

WARM_UP_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class StepGraph:
    """One captured batch size.

    Attributes:
        tokens: [size, 1] int64, the fed tokens.
        positions: [size, 1] int64.
        slots: [size] int64.
        logits: [size, vocab], written by `replay`.
        greedy: [size] int64, written by `replay`.
        replay: Runs the step.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    logits: torch.Tensor
    greedy: torch.Tensor
    replay: Callable[[], None]


class GraphEngine:
    """Implements `DecodeEngine` over a `BlockPool`. Graphs are captured at construction, the largest first."""

    def __init__(self, model: PreTrainedModel, pool: BlockPool, *, max_batch: int) -> None:
        self._model = model
        self._pool = pool
        self._device = pool.key_blocks.device
        self._memory = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        # the smaller ones live in the memory of the largest
        self._graphs = {size: self._capture(size) for size in reversed(batch_sizes(max_batch))}
        log.info("captured decode steps of %s sequences", ", ".join(str(size) for size in sorted(self._graphs)))

    @torch.inference_mode()
    def step(self, batch: Batch[Sequence]) -> list[int]:
        """See `DecodeEngine`."""
        graph = self._graphs[min(size for size in self._graphs if size >= len(batch))]
        fill = len(graph.slots) - len(batch)
        slots = self._pool.tables.bind([sequence.kv for sequence in batch])
        self._load(graph.tokens, [sequence.last_token for sequence in batch] + [0] * fill)
        self._load(graph.positions, [sequence.next_position for sequence in batch] + [0] * fill)
        self._load(graph.slots, slots + [self._pool.tables.trash] * fill)
        graph.replay()
        for sequence in batch:
            sequence.kv.appended += 1
        return draw(batch, graph.logits, graph.greedy[: len(batch)])

    def _load(self, target: torch.Tensor, values: list[int]) -> None:
        target.copy_(torch.tensor(values).view(target.shape))

    @torch.inference_mode()
    def _capture(self, size: int) -> StepGraph:
        """All slots are trash meanwhile, so no sequence's KV is touched."""
        tokens = torch.zeros(size, 1, dtype=torch.int64, device=self._device)
        positions = torch.zeros_like(tokens)
        slots = torch.full((size,), self._pool.tables.trash, dtype=torch.int64, device=self._device)

        def step() -> tuple[torch.Tensor, torch.Tensor]:
            logits = forward(self._model, tokens, positions, BlockAttention(self._pool, slots))
            return logits, logits.argmax(dim=-1)

        logits, greedy, replay = self._record(step)
        return StepGraph(tokens=tokens, positions=positions, slots=slots, logits=logits, greedy=greedy, replay=replay)

    def _record(
        self, step: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
        if self._device.type != "cuda":
            return _rerun(step)
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            # compiles kernels and lets libraries allocate, neither of which may happen while capturing
            for _ in range(WARM_UP_STEPS):
                step()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # the install thread may copy a parcel meanwhile: only this thread's calls are checked
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            logits, greedy = step()
        return logits, greedy, graph.replay


def batch_sizes(max_batch: int) -> list[int]:
    """Powers of two, and `max_batch` itself."""
    sizes = [1 << exponent for exponent in range(max_batch.bit_length()) if 1 << exponent < max_batch]
    return [*sizes, max_batch]


def _rerun(
    step: Callable[[], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
    """What capturing does, where there are no graphs: the same buffers, filled by running `step` again."""
    logits, greedy = step()

    def replay() -> None:
        for buffer, value in zip((logits, greedy), step(), strict=True):
            buffer.copy_(value)

    return logits, greedy, replay
