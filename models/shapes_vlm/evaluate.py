"""Exact match per task with the full cache, by plain `generate`.

`python -m models.shapes_vlm.evaluate --samples 500 --seed 1 --json -` prints one JSON object as its last line.
An answer counts only if every character is right.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from models.shapes_vlm.paths import CHECKPOINT
from models.shapes_vlm.questions import TASKS, Sample, draw_samples


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What to evaluate, and on how many fresh questions."""

    samples: int = 500
    """Questions in all; the tasks take turns."""
    seed: int = 1
    """Seed of the questions; the training data comes from another stream, whatever its seed."""
    tasks: tuple[str, ...] = TASKS
    """Tasks to ask."""
    checkpoint: Path = CHECKPOINT
    """Folder of the model and its processor."""
    dtype: str = "bfloat16"
    """Weights and arithmetic: bfloat16 or float32."""
    batch_size: int = 8
    """Questions of one task generated together."""
    threads: int = 1
    """CPU threads."""
    json: str | None = None
    """Where the JSON object goes: a file, or - for standard output."""

    def __post_init__(self) -> None:
        if min(self.samples, self.batch_size, self.threads) < 1:
            raise ValueError("samples, batch_size and threads must be at least 1")
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype must be bfloat16 or float32, got {self.dtype!r}")


class Answerer:
    """The checkpoint with its processor; answers questions greedily."""

    def __init__(self, checkpoint: Path, dtype: str = "bfloat16") -> None:
        self._processor = AutoProcessor.from_pretrained(checkpoint, backend="pil")
        self._model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def answer(self, samples: Sequence[Sample], max_new_tokens: int = 64) -> list[str]:
        """Answers of a batch; prompts are padded on the left."""
        inputs = self._processor(
            images=[list(sample.images) for sample in samples],
            text=[self.prompt(sample) for sample in samples],
            padding=True,
            add_special_tokens=False,  # the chat template has them
            return_tensors="pt",
        )
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        ids = self._model.generate(**inputs, max_new_tokens=max_new_tokens)
        new = ids[:, inputs["input_ids"].shape[1] :]
        return list(self._processor.batch_decode(new, skip_special_tokens=True))

    def prompt(self, sample: Sample) -> str:
        content = [{"type": "image"}] * len(sample.images) + [{"type": "text", "text": sample.question}]
        messages = [{"role": "user", "content": content}]
        return str(self._processor.apply_chat_template(messages, add_generation_prompt=True))


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Exact match per task and their mean, with what it was measured on."""
    torch.set_num_threads(config.threads)
    answerer, started_s = Answerer(config.checkpoint, config.dtype), time.monotonic()
    asked, right = dict.fromkeys(config.tasks, 0), dict.fromkeys(config.tasks, 0)
    for batch in _batches(config):
        for sample, answer in zip(batch, answerer.answer(batch), strict=True):
            asked[sample.task] += 1
            right[sample.task] += answer == sample.answer
        done = sum(asked.values())
        print(f"\r{done}/{config.samples} questions, {sum(right.values())} right", end="", file=sys.stderr)
    print(file=sys.stderr)
    exact = {task: right[task] / asked[task] for task in config.tasks if asked[task]}
    return {
        "samples": config.samples,
        "seed": config.seed,
        "dtype": config.dtype,
        "retention": 1.0,
        "asked": asked,
        "exact_match": exact,
        "mean_exact_match": sum(exact.values()) / len(exact),
        "wall_s": round(time.monotonic() - started_s, 1),
    }


def _batches(config: EvaluationConfig) -> Iterator[list[Sample]]:
    """Batches of one task each: their questions have equally many images and similar lengths."""
    waiting: dict[str, list[Sample]] = {task: [] for task in config.tasks}
    for sample in draw_samples(seed=config.seed, count=config.samples, tasks=config.tasks):
        batch = waiting[sample.task]
        batch.append(sample)
        if len(batch) == config.batch_size:
            yield batch
            waiting[sample.task] = []
    yield from (batch for batch in waiting.values() if batch)


def main() -> None:
    logging.disable_progress_bar()
    config = tyro.cli(EvaluationConfig, description=__doc__)
    result = evaluate(config)
    for task, share in result["exact_match"].items():
        print(f"{task:14} {100 * share:6.1f} %  of {result['asked'][task]}")
    print(f"{'mean':14} {100 * result['mean_exact_match']:6.1f} %")
    if config.json == "-":
        print(json.dumps(result))
    elif config.json:
        Path(config.json).write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
