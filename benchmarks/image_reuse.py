"""What a prefill worker gains on a second question about the same images: time to its first token, part by part.

Each pair of questions is asked of one model three times: with nothing kept (`none`), with kept features of images
(`features`, `--vision-cache-mib`), and with the kept KV of the prompt up to its last image as well (`prefix`,
`--prefix-cache-mib`). The worker's own code from the encoded images to the first token, without queue and network; its
preprocessing is in this process, and the same in all three.

    python -m benchmarks.image_reuse --pairs 60 --json -
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.local_pipeline import MAX_IMAGES, local_job
from benchmarks.quality.runner import messages_for
from benchmarks.report import table, write_json
from benchmarks.stopwatch import percentiles
from models.shapes_vlm.pairs import Pair, draw_pairs
from models.shapes_vlm.paths import CHECKPOINT
from models.shapes_vlm.questions import Sample
from prefill_worker.compression.eviction import parcel_bound
from prefill_worker.compression.registry import DEFAULT_POLICY, build_policy
from prefill_worker.compute import PrefillCompute
from prefill_worker.config import PrefillConfig
from prefill_worker.engine.engine import PrefillEngine
from prefill_worker.job import Event, FirstToken
from prefill_worker.prompt import PromptBuilder
from shared.config import Dtype
from shared.model.checkpoint import open_checkpoint
from shared.model.loading import load_prefill_model
from shared.model.processor import load_processor
from shared.request.params import Budget
from shared.rpc.options import MIB
from shared.telemetry.metrics import PrefillMetrics

# What each engine keeps: MiB of features, MiB of prefixes.
KEEPS = {"none": (0, 0), "features": (256, 0), "prefix": (256, 1024)}
HEADER = (
    "images",
    "kept",
    "first question p50, ms",
    "second p5",
    "second p50",
    "second p95",
    "of none",
    "pass alone",
    "same kept tokens",
)


@dataclass(frozen=True, kw_only=True)
class ImageReuseConfig:
    """What to measure."""

    pairs: int = 60
    """Pairs of questions, each about images of its own, spread evenly over the tasks."""
    seed: int = 11
    """Seed of the pairs."""
    tasks: tuple[str, ...] = ("read", "read_in_image", "read_in_four")
    """Tasks of the second questions: about one, two and four images."""
    retention: float = 0.1
    """Kept share of the KV, in (0, 1]."""
    model: str = str(CHECKPOINT)
    """Checkpoint directory or hub id."""
    dtype: Dtype = "auto"
    """Precision of weights and KV; auto is bfloat16 on a GPU or an AMX machine, else float32."""
    threads: int = 1
    """torch threads; more than there are idle cores is far slower than one."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE|-")] = None
    """Where to write the figures; `-` prints them as the last line."""

    def __post_init__(self) -> None:
        if self.pairs < 2 * len(self.tasks):
            raise ValueError("percentiles need at least two pairs per task")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question: milliseconds to its first token, those of the model's pass in it, that token, and what was kept.

    `kept`: [num_layers * num_kv_heads, tokens] bool.
    """

    ttft_ms: float
    pass_ms: float
    token: int
    kept: NDArray[np.bool_]


@dataclass(kw_only=True)
class Figures:
    """What was measured of one way to keep, by the number of images."""

    first: dict[int, list[Asked]] = field(default_factory=lambda: defaultdict(list))
    second: dict[int, list[Asked]] = field(default_factory=lambda: defaultdict(list))


class Worker:
    """The stages of a prefill worker up to the first token, over one model and three engines."""

    def __init__(self, config: ImageReuseConfig) -> None:
        checkpoint = open_checkpoint(PrefillConfig(model=config.model, dtype=config.dtype, threads=config.threads))
        model = load_prefill_model(checkpoint.path, dtype=checkpoint.dtype, device=checkpoint.device)
        processor, self._layout = load_processor(checkpoint.path), checkpoint.spec.layout
        self._builder = PromptBuilder(processor, checkpoint.spec, max_images=MAX_IMAGES)
        policy, budget = build_policy(DEFAULT_POLICY, {}), Budget(retention=config.retention)
        self._job = replace(local_job(policy, budget, max_new_tokens=2), explain=True)
        self._computes = {}
        for name, (features, prefixes) in KEEPS.items():
            engine = PrefillEngine(model, vision_cache_bytes=features * MIB, prefix_cache_bytes=prefixes * MIB)
            metrics = PrefillMetrics(worker="bench", model="bench")
            self._computes[name] = PrefillCompute(
                engine, processor.tokenizer, checkpoint.spec, checkpoint.identity, metrics
            )

    def ask(self, kept: str, sample: Sample) -> Asked:
        """One question through all stages."""
        messages, events = messages_for(sample), dict[type[Event], tuple[float, Event]]()
        started = time.perf_counter()
        prompt = self._builder.build(messages, max_new_tokens=2)
        visual = prompt.shape.num_visual
        rows = self._job.rows_bound(prompt.shape.num_tokens - visual, visual)
        body = memoryview(bytearray(parcel_bound(self._job.policy, self._layout, rows)))
        computed = time.perf_counter()
        complete = self._computes[kept].run(
            self._job, prompt, body, lambda event: events.update({type(event): (time.perf_counter(), event)})
        )
        at, first = events[FirstToken]
        assert isinstance(first, FirstToken)
        assert complete is not None, "an answer that ignores the end has more tokens"
        chosen = np.stack([np.unpackbits(np.frombuffer(head, np.uint8)) for head in complete().kept_tokens])
        return Asked(
            ttft_ms=1000 * (at - started),
            pass_ms=1000 * (at - computed),
            token=first.token,
            kept=chosen.astype(bool),
        )


def measure(config: ImageReuseConfig) -> list[dict[str, Any]]:
    """One row per number of images and way to keep."""
    worker, figures = Worker(config), {name: Figures() for name in KEEPS}
    pairs = list(draw_pairs(seed=config.seed, count=config.pairs, tasks=config.tasks))
    for pair in pairs[: len(config.tasks)]:
        _ask_pair(worker, pair, {name: Figures() for name in KEEPS})
    # a fresh worker: the warm-up's images are known to the other one
    worker = Worker(config)
    for pair in tqdm(pairs, unit="pair", file=sys.stderr):
        _ask_pair(worker, pair, figures)
    images = sorted(figures["none"].second)
    return [_row(count, name, figures) for count in images for name in KEEPS]


def _ask_pair(worker: Worker, pair: Pair, figures: dict[str, Figures]) -> None:
    """The ways take turns, so that a noisy machine disturbs all alike."""
    for index, sample in enumerate(pair):
        for name, found in figures.items():
            asked = worker.ask(name, sample)
            (found.second if index else found.first)[len(sample.images)].append(asked)


def _row(images: int, name: str, figures: dict[str, Figures]) -> dict[str, Any]:
    first, second = figures[name].first[images], figures[name].second[images]
    base = figures["none"].second[images]
    both = list(zip(second, base, strict=True))
    same = [asked.token == plain.token for asked, plain in both]
    common = sum(int((asked.kept & plain.kept).sum()) for asked, plain in both)
    return {
        "images": images,
        "kept": name,
        "pairs": len(second),
        "first_ms": percentiles(_ttft(first)),
        "second_ms": percentiles(_ttft(second)),
        "second_of_none": median(_ttft(second)) / median(_ttft(base)),
        "pass_of_none": median(asked.pass_ms for asked in second) / median(asked.pass_ms for asked in base),
        "same_first_token_share": sum(same) / len(same),
        "same_kept_share": common / sum(int(plain.kept.sum()) for _, plain in both),
    }


def _ttft(asked: Sequence[Asked]) -> list[float]:
    return [each.ttft_ms for each in asked]


def _cells(row: dict[str, Any]) -> list[str]:
    second = [f"{row['second_ms'][name]:.1f}" for name in ("p5", "p50", "p95")]
    ratios = [f"{row[name]:.2f}" for name in ("second_of_none", "pass_of_none")]
    return [
        str(row["images"]),
        row["kept"],
        f"{row['first_ms']['p50']:.1f}",
        *second,
        *ratios,
        f"{row['same_kept_share']:.5f}",
    ]


def main() -> None:
    """Measures, prints a table, writes JSON."""
    config = tyro.cli(ImageReuseConfig, description=__doc__)
    rows = measure(config)
    sys.stdout.write(table(HEADER, [_cells(row) for row in rows]) + "\n")
    workload = {name: getattr(config, name) for name in ("pairs", "seed", "tasks", "retention", "dtype", "threads")}
    workload["model"] = os.path.relpath(Path(config.model))
    write_json(config.json, {"benchmark": "image_reuse", "workload": workload, "results": rows})


if __name__ == "__main__":
    main()
