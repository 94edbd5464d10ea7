"""A batch of long prompts from their first token to their last: our path beside transformers' `generate`.

Ours prefills prompt by prompt with statistics, selects, writes the parcel, installs it, and steps the whole batch with
the engine of the decode worker, which exists before, as in a running worker; what is left out is the network.
transformers prefills the batch at once and keeps the full cache. Both have the same random weights and greedy tokens.

    python -m benchmarks.end_to_end --batch 4 --prompt 500 --new-tokens 32 --json -
    python -m benchmarks.end_to_end --device cuda --shape llava-1.6-mistral-7b --batch 64 --new-tokens 100 --json -
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import tyro
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.random_kv import build_engine, build_pool, even, pool_bytes
from benchmarks.random_llama import ModelConfig, baseline_attention, build_model, device_facts, twin
from benchmarks.report import table, write_json
from benchmarks.stopwatch import elapsed_ms, release_memory
from decode_worker.kv_pool.base import Allocation
from decode_worker.sequence import Sequence
from prefill_worker.compression.pipeline import keep_everything, select_tokens, statistics_for
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.engine.engine import PrefillEngine
from prefill_worker.parcel.writer import kept_counts, write_body
from prefill_worker.prompt import Prompt
from shared.model.attention import PREFILL_ATTENTION
from shared.model.packing import pack_linears
from shared.model.sampler import Sampler
from shared.request.params import Budget
from shared.request.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class EndToEndConfig(ModelConfig):
    """What to measure."""

    batch: int = 4
    """Prompts."""
    prompt: int = 2000
    """Tokens of each prompt."""
    rows: int = 64
    """Tokens after the (pretended) image: the rows that are observed."""
    new_tokens: int = 100
    """Tokens that each prompt gets, the prefill's included."""
    retention: float = 0.1
    """Share of the KV that ours keeps."""
    rounds: int = 3
    """Measured runs of each side."""

    def __post_init__(self) -> None:
        if self.new_tokens < 2:
            raise ValueError(f"new_tokens must be at least 2, not {self.new_tokens}")
        if not 1 <= self.rows < self.prompt:
            raise ValueError(f"rows must lie between 1 and the prompt's {self.prompt} tokens, not {self.rows}")


@dataclass(frozen=True, kw_only=True)
class Installed:
    """A prompt after its hand-over."""

    sequence: Sequence
    allocation: Allocation


class Ours:
    """Both workers' stages in one process.

    Attributes:
        seconds: Per stage, what all prompts of the last run took.
    """

    def __init__(self, config: EndToEndConfig, model: PreTrainedModel) -> None:
        self._config = config
        self._growth = config.new_tokens - 1
        self._budget, self._layout, self._policy = Budget(retention=config.retention), config.layout, VLCache()
        self._prefill = PrefillEngine(twin(model, PREFILL_ATTENTION))
        decode = twin(model, model.config._attn_implementation)
        pack_linears(decode)
        bound = self._budget.kept_tokens_bound(0, config.prompt)
        # a block more for every row: kept counts are ragged, and each row ends within a block
        rows = even(self._layout, [bound + config.block_size] * self._layout.num_layers)
        self._pool = build_pool(
            config,
            pool_bytes(config, rows, self._growth, config.batch),
            max_num_seqs=config.batch,
            max_tokens=config.prompt + config.new_tokens,
            random=False,
        )
        self._engine = build_engine(decode, self._pool, max_num_seqs=config.batch)
        self._body = memoryview(bytearray(self._layout.full_bytes(bound)))
        self.seconds: dict[str, float] = {}

    def generate(self, prompts: torch.Tensor) -> list[list[int]]:
        """Tokens of each prompt; prompts are [batch, tokens] int64."""
        self.seconds = defaultdict(float)
        batch = [self._admit(prompt[None]) for prompt in prompts]
        tokens = [[item.sequence.last_token] for item in batch]
        with self._stage("decode"):
            sequences = [item.sequence for item in batch]
            for _ in range(self._growth):
                for row, sequence, drawn in zip(tokens, sequences, self._engine.step(sequences), strict=True):
                    sequence.accept(drawn)
                    row.append(drawn.token)
        for item in batch:
            self._pool.free(item.allocation)
        return tokens

    def _admit(self, prompt: torch.Tensor) -> Installed:
        described, compress = self._describe(prompt), self._config.retention < 1
        with self._stage("prefill"):
            statistics = statistics_for(self._policy, described.shape) if compress else ()
            prefilled = self._prefill.prefill(described, statistics, threading.Event())
            first = int(prefilled.logits.argmax())
        with self._stage("parcel"):
            selections = keep_everything(self._layout.num_layers)
            if compress:
                selections = select_tokens(self._policy, prefilled.observed(described.shape), self._budget)
            num_kept = kept_counts(prefilled, selections)
            body = self._body[: self._layout.body_bytes(num_kept)]
            write_body(prefilled, selections, num_kept, self._layout, body)()
        with self._stage("install"):
            allocation = self._pool.allocate(self._pool.sequence_bytes(num_kept, self._growth))
            kv = self._pool.install(allocation, num_kept, body, self._growth)
        sequence = Sequence(
            kv=kv,
            sampler=Sampler(Sampling(max_new_tokens=self._config.new_tokens), frozenset()),
            last_token=first,
            next_position=prompt.shape[1],
        )
        return Installed(sequence=sequence, allocation=allocation)

    def _describe(self, prompt: torch.Tensor) -> Prompt:
        """The policy is told that an image ends `rows` tokens before the end."""
        num_tokens = prompt.shape[1]
        positions = torch.arange(num_tokens)
        return Prompt(
            inputs={"input_ids": prompt},
            position_ids=positions[None],
            next_position=prompt.shape[1],
            shape=PromptShape(visual=positions < num_tokens - self._config.rows),
            pixels=(),
        )

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started


class Theirs:
    """transformers alone."""

    def __init__(self, config: EndToEndConfig, model: PreTrainedModel) -> None:
        self._model = twin(model, baseline_attention(config))
        self._settings = GenerationConfig(max_new_tokens=config.new_tokens, do_sample=False, pad_token_id=0)

    def generate(self, prompts: torch.Tensor) -> list[list[int]]:
        """As `Ours.generate`."""
        prompts = prompts.to(self._model.device)
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=self._settings
            )
        tokens: list[list[int]] = output[:, prompts.shape[1] :].tolist()
        return tokens


def measure(config: EndToEndConfig) -> dict[str, Any]:
    """Medians in s over the rounds, ours and theirs in turns."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    model = build_model(config, positions=config.prompt + config.new_tokens)
    prompts = torch.randint(config.text.vocabulary, (config.batch, config.prompt))
    sides: dict[str, Ours | Theirs] = {"ours": Ours(config, model), "hf": Theirs(config, model)}
    for side in sides.values():
        side.generate(prompts[:1])
    times: dict[str, list[float]] = {name: [] for name in sides}
    stages: list[dict[str, float]] = []
    for _ in tqdm(range(config.rounds), unit="round", file=sys.stderr):
        for name, side in sides.items():
            release_memory()
            times[name].append(elapsed_ms(partial(side.generate, prompts), config.torch_device) / 1000)
            if isinstance(side, Ours):
                stages.append(side.seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        **{f"{name}_s": value for name, value in median.items()},
        "speed_up": median["hf"] / median["ours"],
        "ours_stages_s": {name: statistics.median(run[name] for run in stages) for name in stages[0]},
        "rounds_s": times,
        "hf_attention": baseline_attention(config),
        **device_facts(config),
    }


def main() -> None:
    """Measures, prints a table, writes JSON."""
    config = tyro.cli(EndToEndConfig, description=__doc__)
    figures = measure(config)
    rows = [[name, f"{seconds:.2f}"] for name, seconds in figures["ours_stages_s"].items()]
    rows += [["all of ours", f"{figures['ours_s']:.2f}"], ["transformers", f"{figures['hf_s']:.2f}"]]
    sys.stdout.write(f"{table(['stage', 's'], rows)}\n\nspeed-up {figures['speed_up']:.2f}\n")
    write_json(config.json, {"benchmark": "end_to_end", "workload": config.workload, **figures})


if __name__ == "__main__":
    main()
