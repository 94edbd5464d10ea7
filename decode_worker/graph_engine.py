"""Decode steps as CUDA graphs: one per batch size, so that a step costs the GPU's time and not Python's.

transformers launches about ten kernels per layer from Python, which takes longer than a GPU needs to read 7B weights.
A captured graph replays all of them with one call. Its inputs lie in fixed buffers, batches are filled up to the next
captured size with the pool's trash slot, and nothing in it depends on values that only the host knows.

A batch in which some sequence evicts, or reads only some rows, is stepped eagerly: its rows move as the step goes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Batch
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from decode_worker.engine import EagerEngine, draw, forward, highest_tokens
from decode_worker.kv_pool.blocks import BlockAttention, BlockPool
from decode_worker.sequence import Sequence
from shared.model.progress import track
from shared.model.sampler import Drawn

log = logging.getLogger(__name__)

WARM_UP_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class StepGraph:
    """One captured batch size.

    Attributes:
        inputs: [3, size] int64: the fed tokens, their positions, the sequences' slots.
        logits: [size, vocab], written by `replay`.
        greedy: [size] int64, written by `replay`.
        replay: Runs the step.
    """

    inputs: torch.Tensor
    logits: torch.Tensor
    greedy: torch.Tensor
    replay: Callable[[], None]


class GraphEngine:
    """Implements `DecodeEngine` over a `BlockPool`. Graphs are captured at construction, the largest first."""

    def __init__(self, model: PreTrainedModel, pool: BlockPool, *, max_num_seqs: int) -> None:
        self._model = model
        self._pool = pool
        self._eager = EagerEngine(model, pool)
        self._device = pool.key_blocks.device
        self._stream, self._memory = _stream_and_memory(self._device)
        # the smaller ones live in the memory of the largest
        sizes = batch_sizes(max_num_seqs)[::-1]
        self._graphs = {size: self._capture(size) for size in track(sizes, "decode steps captured")}
        log.info("captured decode steps of %s sequences", ", ".join(str(size) for size in sorted(self._graphs)))

    @torch.inference_mode()
    def step(self, batch: Batch[Sequence]) -> list[Drawn]:
        """See `DecodeEngine`."""
        if any(sequence.kv.eviction for sequence in batch):
            with torch.cuda.stream(self._stream):
                return self._eager.step(batch)
        with torch.cuda.stream(self._stream):
            graph = self._feed(batch)
            for sequence in batch:
                sequence.kv.appended += 1
            return draw(batch, graph.logits, graph.greedy[: len(batch)])

    @torch.inference_mode()
    def replay(self, sequence: Sequence, number: int) -> None:
        """See `DecodeEngine`; a layer's rows are appended by a launch of their own, before any token attends."""
        with torch.cuda.stream(self._stream):
            self._feed(sequence.steps_ahead(number))
        if self._stream:
            # nothing is read that would wait for the GPU, and the sequence's memory may be given back next
            self._stream.synchronize()
        sequence.kv.appended += number

    def _feed(self, batch: Batch[Sequence]) -> StepGraph:
        """Runs the smallest graph that the batch fits in."""
        graph = self._graphs[min(size for size in self._graphs if size >= len(batch))]
        slots = self._pool.tables.bind([sequence.kv for sequence in batch])
        rows = [(each.last_token, each.next_position, slot) for each, slot in zip(batch, slots, strict=True)]
        rows += [(0, 0, self._pool.tables.trash)] * (graph.inputs.shape[1] - len(batch))
        graph.inputs.copy_(torch.tensor(rows).T)
        graph.replay()
        return graph

    @torch.inference_mode()
    def _capture(self, size: int) -> StepGraph:
        """All slots are trash meanwhile, so no sequence's KV is touched."""
        with torch.cuda.stream(self._stream):
            inputs = torch.zeros(3, size, dtype=torch.int64, device=self._device)
            tokens, positions, slots = inputs
            slots.fill_(self._pool.tables.trash)

            def step() -> tuple[torch.Tensor, torch.Tensor]:
                self._pool.tables.advance(slots)
                attention = BlockAttention(self._pool, slots)
                logits = forward(self._model, tokens[:, None], positions[:, None], attention)
                return logits, highest_tokens(logits)

            logits, greedy, replay = self._record(step)
        return StepGraph(inputs=inputs, logits=logits, greedy=greedy, replay=replay)

    def _record(
        self, step: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
        if self._device.type != "cuda":
            return _rerun(step)
        # compiles kernels and lets libraries allocate, neither of which may happen while capturing
        for _ in range(WARM_UP_STEPS):
            step()
        graph = torch.cuda.CUDAGraph()
        # whatever else this process does on the GPU meanwhile is no part of the graph: only this thread is checked
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode=mode):
            logits, greedy = step()
        return logits, greedy, graph.replay


def batch_sizes(max_num_seqs: int) -> list[int]:
    """Powers of two, and `max_num_seqs` itself."""
    sizes = [1 << exponent for exponent in range(max_num_seqs.bit_length()) if 1 << exponent < max_num_seqs]
    return [*sizes, max_num_seqs]


def _stream_and_memory(device: torch.device) -> tuple[torch.cuda.Stream | None, Any]:
    """Where all graphs of an engine run, so that they share the libraries' workspaces, and where they allocate.

    In the default stream a step would wait for whatever other threads put there.
    """
    if device.type != "cuda":
        return None, None
    stream = torch.cuda.Stream(device)
    # weights and pool are in place
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream, torch.cuda.graph_pool_handle()


def _rerun(
    step: Callable[[], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
    """What capturing does, where there are no graphs: the same buffers, filled by running `step` again."""
    logits, greedy = step()

    def replay() -> None:
        for buffer, value in zip((logits, greedy), step(), strict=True):
            buffer.copy_(value)

    return logits, greedy, replay
