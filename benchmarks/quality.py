"""How many answers stay right under compression: exact match by policy, retention and task on fresh questions.

python -m benchmarks.quality --samples 500 --seed 7 --policies vl_cache --retentions 1.0 0.1 --json -
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from tqdm import tqdm
from vlcache.v1 import inference_pb2 as public

from benchmarks.local_pipeline import Answer, LocalPipeline
from benchmarks.report import table, wilson_interval, write_json
from models.shapes_vlm.paths import CHECKPOINT
from models.shapes_vlm.questions import TASKS, Sample, draw_samples
from prefill_worker.compression.registry import DEFAULT_POLICY, build_policy
from prefill_worker.prompt import Prompt

BATCH = 16
KV_MEMORY_MIB = 512
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """What to measure."""

    samples: int = 500
    """Questions in all, each about a scene of its own, spread evenly over the tasks."""
    seed: int = 7
    """Seed of the questions; the training used other ones."""
    policies: tuple[str, ...] = (DEFAULT_POLICY,)
    """Compression policies."""
    retentions: tuple[float, ...] = (1.0, 0.1)
    """Kept shares, each in (0, 1]."""
    tasks: tuple[str, ...] = TASKS
    """Tasks to ask about."""
    model: str = str(CHECKPOINT)
    """Checkpoint directory or hub id; questions are about the bundled model's kind of images."""
    dtype: str = "auto"
    """auto, fp32 or bf16."""
    threads: int = 1
    """torch threads; more than there are idle cores is far slower than one."""
    max_new_tokens: int = 160
    """Longest answer, in tokens."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE|-")] = None
    """Where to write the figures; `-` prints them as the last line."""

    def __post_init__(self) -> None:
        unknown = set(self.tasks) - set(TASKS)
        if unknown:
            raise ValueError(f"unknown tasks {sorted(unknown)}; known: {', '.join(TASKS)}")
        if self.samples < len(self.tasks):
            raise ValueError("at least one sample per task is needed")


@dataclass(frozen=True)
class Scored:
    """One answered question."""

    sample: Sample
    answer: Answer

    @property
    def right(self) -> bool:
        """Exact match, surrounding white space aside."""
        return self.answer.text.strip() == self.sample.answer.strip()


def messages_for(sample: Sample) -> list[public.Message]:
    """The sample as a chat request."""
    parts = [public.Part(image=public.Image(data=_png(image))) for image in sample.images]
    return [public.Message(role="user", parts=[*parts, public.Part(text=sample.question)])]


def measure(config: QualityConfig) -> list[dict[str, Any]]:
    """One row per policy, retention and task, and one with the task `all`."""
    pipeline = LocalPipeline(config.model, dtype=config.dtype, threads=config.threads, kv_memory_mib=KV_MEMORY_MIB)
    settings = [(name, retention) for name in config.policies for retention in config.retentions]
    scored: dict[tuple[str, float], list[Scored]] = {setting: [] for setting in settings}
    with tqdm(total=config.samples * len(settings), unit="answer", file=sys.stderr) as progress:
        for samples, prompts in _batches(config, pipeline):
            for name, retention in settings:
                policy = build_policy(name, {})
                answers = pipeline.answer(prompts, policy, retention, config.max_new_tokens)
                scored[name, retention] += map(Scored, samples, answers)
                progress.update(len(samples))
    return [
        _row(name, retention, task, [item for item in items if task in (ALL, item.sample.task)])
        for (name, retention), items in scored.items()
        for task in (*config.tasks, ALL)
    ]


def _batches(config: QualityConfig, pipeline: LocalPipeline) -> Iterator[tuple[list[Sample], list[Prompt]]]:
    samples = draw_samples(seed=config.seed, count=config.samples, tasks=config.tasks)
    batch: list[Sample] = []
    for index, sample in enumerate(samples, start=1):
        batch.append(sample)
        if len(batch) == BATCH or index == config.samples:
            built = [pipeline.build(messages_for(item), max_new_tokens=config.max_new_tokens) for item in batch]
            yield batch, built
            batch = []


def _row(policy: str, retention: float, task: str, items: Sequence[Scored]) -> dict[str, Any]:
    right = sum(item.right for item in items)
    low, high = wilson_interval(right, len(items))
    reports = [item.answer.compression for item in items if item.answer.compression is not None]
    full, kept = sum(report.full_bytes for report in reports), sum(report.kept_bytes for report in reports)
    masses = [sum(report.layer_attention_mass) / len(report.layer_attention_mass) for report in reports]
    return {
        "policy": policy,
        "retention": retention,
        "task": task,
        "samples": len(items),
        "exact_match": right / len(items),
        "exact_match_low": low,
        "exact_match_high": high,
        "realised_retention": kept / full if full else 1.0,
        "kept_bytes_mean": kept / len(reports) if reports else 0,
        "kept_attention_mass": sum(masses) / len(masses) if masses else 1.0,
    }


def _png(image: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def _print_table(config: QualityConfig, rows: list[dict[str, Any]]) -> None:
    tasks = [*config.tasks, ALL]
    settings = list(dict.fromkeys((row["policy"], row["retention"]) for row in rows))
    figures = {(row["policy"], row["retention"], row["task"]): row["exact_match"] for row in rows}
    lines = [
        [policy, f"{retention:g}", *(f"{100 * figures[policy, retention, task]:.1f}" for task in tasks)]
        for policy, retention in settings
    ]
    sys.stdout.write(table(["policy", "retention", *tasks], lines) + "\n")


def main() -> None:
    """Measures, prints a table, writes JSON."""
    config = tyro.cli(QualityConfig, description=__doc__)
    rows = measure(config)
    _print_table(config, rows)
    workload = {
        "samples": config.samples,
        "seed": config.seed,
        "model": os.path.relpath(config.model),
        "dtype": config.dtype,
    }
    write_json(config.json, {"benchmark": "quality", "workload": workload, "results": rows})


if __name__ == "__main__":
    main()
