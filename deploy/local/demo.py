"""Asks the bundled questions about the bundled images and shows what each answer cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import vlcache

from deploy.local.report import INDENT, Result, Sample, Summary, to_document
from deploy.local.stack import EXIT_FAILED, Stack, StackConfig
from models.shapes_vlm.paths import SAMPLES

MAX_NEW_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class DemoConfig(StackConfig):
    """Start router and workers, ask the bundled questions, print answers and bytes, stop."""

    samples: Path = SAMPLES
    """Folder with samples.json and its images."""
    json: str = ""
    """Where one JSON object with all figures goes: a file, or - for the last line of stdout."""


def load_samples(folder: Path) -> list[Sample]:
    """The questions of `folder/samples.json`.

    Raises:
        ValueError: The file is missing or is not a list of samples.
    """
    try:
        entries = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
        return [
            Sample(
                images=tuple(entry["images"]),
                question=entry["question"],
                answer=entry["answer"],
                task=entry["task"],
            )
            for entry in entries
        ]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'samples.json'} holds no samples: {error!r}") from error


async def run_demo(stack: Stack, config: DemoConfig, samples: Sequence[Sample]) -> int:
    """Asks all questions one after another; returns the exit code, which is 1 only when a request failed."""
    print(f"asking {len(samples)} questions at {stack.address}")
    results = []
    async with stack.client() as client:
        for number, sample in enumerate(samples, start=1):
            print(f"\n[{number}/{len(samples)}]".ljust(len(INDENT) + 1) + f"{', '.join(sample.images)} ({sample.task})")
            result = await _ask(client, config.samples, sample)
            if result is not None:
                results.append(result)
    summary = Summary.of(results, questions=len(samples))
    print(f"\n{summary.line()}", flush=True)
    _write_json(config.json, results, summary)
    return 0 if len(results) == len(samples) else EXIT_FAILED


async def _ask(client: vlcache.AsyncClient, folder: Path, sample: Sample) -> Result | None:
    """Streams one answer to the terminal; None when the request failed."""
    print(f"{INDENT}question {sample.question}\n{INDENT}answer   ", end="", flush=True)
    sampling = vlcache.Sampling(max_new_tokens=MAX_NEW_TOKENS)
    images = [folder / name for name in sample.images]
    try:
        async with client.stream(sample.question, images=images, sampling=sampling) as stream:
            async for event in stream:
                if isinstance(event, vlcache.Delta):
                    print(event.text, end="", flush=True)
            result = Result.of(sample, await stream.result())
    except (vlcache.VlcacheError, OSError) as error:
        print(f"\n{INDENT}failed   {error}", flush=True)
        return None
    print("\n" + "\n".join(result.lines()), flush=True)
    return result


def _write_json(target: str, results: Sequence[Result], summary: Summary) -> None:
    line = json.dumps(to_document(results, summary))
    if target == "-":
        print(line, flush=True)
    elif target:
        Path(target).write_text(line + "\n", encoding="utf-8")
