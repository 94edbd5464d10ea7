"""The measured calls: every kernel of every backend, and what PyTorch offers instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.kernels.config import KernelsConfig
from benchmarks.kernels.inputs import BlockCache, block_cache, dense, full_lengths, kept_lengths
from shared.kernels.dispatch import Kernels, kernels_for
from shared.kernels.splits import choose_splits

COPY = "copy"
# VL-Cache's p.
THRESHOLD = 0.01


@dataclass(frozen=True, kw_only=True)
class Case:
    """One contender of one question.

    Attributes:
        question: What is computed; the contenders of a question do the same work.
        contender: Who computes it.
        run: Goes through all layers once; returns what the contenders of a question must agree on.
        nbytes: Bytes that have to be read and written; None where memory is not the limit.
        capturable: Whether a CUDA graph can replay it; otherwise the host's own work is measured with it.
    """

    question: str
    contender: str
    run: Callable[[], Sequence[torch.Tensor]]
    nbytes: int | None
    capturable: bool


def all_cases(config: KernelsConfig) -> Iterator[Case]:
    """Everything that can run on the device, with inputs of its own."""
    yield _copy(config)
    for question, lengths in (("attention_full", full_lengths(config)), ("attention_kept", kept_lengths(config))):
        cache = block_cache(config, lengths)
        yield from _attention(config, question, cache)
        yield _sdpa(config, question, cache)
        yield from _append(config, question.replace("attention", "append"), cache)
    yield from _gather(config)
    yield from _statistics(config)


def contenders(config: KernelsConfig) -> list[Kernels]:
    """The backends that run on the device."""
    names = ("triton", "reference") if config.device == "cuda" else ("reference",)
    return [kernels_for(config.torch_device, name) for name in names]


def _copy(config: KernelsConfig) -> Case:
    source = torch.zeros(config.copy_mib << 20, dtype=torch.uint8, device=config.device)
    target = torch.empty_like(source)

    def run() -> list[torch.Tensor]:
        target.copy_(source)
        return []

    return Case(question=COPY, contender="device", run=run, nbytes=2 * source.numel(), capturable=True)


def _attention(config: KernelsConfig, question: str, cache: BlockCache) -> Iterator[Case]:
    queries = dense(config, config.batch, config.query_heads, config.head_dim)
    splits = choose_splits(config.batch, config.kv_heads, cache.max_length, _multiprocessors(config))
    for kernels in contenders(config):

        def run(kernels: Kernels = kernels) -> list[torch.Tensor]:
            return [
                kernels.paged_attention(query, *cache.layer(layer), config.scaling, splits)
                for layer, query in enumerate(queries)
            ]

        yield Case(
            question=question,
            contender=kernels.name,
            run=run,
            nbytes=cache.kv_bytes,
            capturable=kernels.name == "triton",
        )


def _sdpa(config: KernelsConfig, question: str, cache: BlockCache) -> Case:
    """Dense K and V, padded to the longest and masked where lengths differ; only useful bytes count."""
    queries = dense(config, config.batch, config.query_heads, 1, config.head_dim)
    keys, values = (dense(config, config.batch, config.kv_heads, cache.max_length, config.head_dim) for _ in range(2))
    positions = torch.arange(cache.max_length, device=config.device)
    masks: list[torch.Tensor | None] = [None] * config.layers
    if int(cache.lengths.min()) < cache.max_length:
        group = config.query_heads // config.kv_heads
        masks = [(positions < rows[:, :, None, None]).repeat_interleave(group, dim=1) for rows in cache.lengths]

    def run() -> list[torch.Tensor]:
        for query, key, value, mask in zip(queries, keys, values, masks, strict=True):
            torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=config.scaling, enable_gqa=True
            )
        return []

    return Case(question=question, contender="sdpa", run=run, nbytes=cache.kv_bytes, capturable=True)


def _append(config: KernelsConfig, question: str, cache: BlockCache) -> Iterator[Case]:
    keys, values = (dense(config, config.batch, config.kv_heads, config.head_dim) for _ in range(2))
    for kernels in contenders(config):

        def run(kernels: Kernels = kernels) -> list[torch.Tensor]:
            for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
                kernels.append_token(key, value, *cache.layer(layer))
            return []

        nbytes = 4 * sum(key.nbytes for key in keys)
        capturable = kernels.name == "triton"
        yield Case(question=question, contender=kernels.name, run=run, nbytes=nbytes, capturable=capturable)


def _gather(config: KernelsConfig) -> Iterator[Case]:
    """One prompt's parcel; the host's preparation is part of it."""
    keys, values = (dense(config, config.kv_heads, config.prompt, config.head_dim) for _ in range(2))
    counts = kept_lengths(config)[:, 0].flatten().tolist()
    picked = [torch.randperm(config.prompt)[:count].sort().values for count in counts]
    indices = torch.cat(picked).to(config.device, torch.int32)
    for kernels in contenders(config):
        out = torch.empty(2 * len(indices), config.head_dim, dtype=config.torch_dtype, device=config.device)

        def run(kernels: Kernels = kernels, out: torch.Tensor = out) -> list[torch.Tensor]:
            kernels.gather_rows(keys, values, indices, counts, out)
            return [out]

        yield Case(question="gather", contender=kernels.name, run=run, nbytes=2 * out.nbytes, capturable=False)


def _statistics(config: KernelsConfig) -> Iterator[Case]:
    queries = dense(config, config.query_heads, config.rows, config.head_dim)
    keys = dense(config, config.kv_heads, config.prompt, config.head_dim)
    first = config.prompt - config.rows
    for kernels in contenders(config):

        def run(kernels: Kernels = kernels) -> list[torch.Tensor]:
            return [
                kernels.post_vision_statistics(query, key, first, config.scaling, THRESHOLD)[0]
                for query, key in zip(queries, keys, strict=True)
            ]

        yield Case(question="statistics", contender=kernels.name, run=run, nbytes=None, capturable=False)


def _multiprocessors(config: KernelsConfig) -> int:
    if config.device == "cpu":
        return 1
    return torch.cuda.get_device_properties(config.torch_device).multi_processor_count
