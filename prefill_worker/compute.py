"""What happens in the model thread: prefill -> first token -> selection -> parcel."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from vlcache.v1 import inference_pb2 as public

from prefill_worker.compression.eviction import add_scores, eviction_for
from prefill_worker.compression.key_channels import wire_statistics
from prefill_worker.compression.pipeline import (
    Selection,
    asked_retention,
    keep_everything,
    select_tokens,
    sparse_prefill_for,
    statistics_for,
)
from prefill_worker.compression.sparse.prefill import SparsePrefill
from prefill_worker.engine import Prefilled, PrefillEngine
from prefill_worker.job import Compressed, Event, FirstToken, PrefillJob
from prefill_worker.parcel_writer import kept_counts
from prefill_worker.prompt import Prompt
from prefill_worker.wire_stage import WrittenBody, write_kept
from shared.kv.eviction import Eviction
from shared.kv.manifest import Manifest, body_digest, layer_tokens
from shared.model.identity import ModelIdentity
from shared.model.sampler import sample
from shared.model.spec import VLMSpec
from shared.model.text_stream import TextStream
from shared.telemetry.metrics import PrefillMetrics

Emit = Callable[[Event], None]
Completion = Callable[[], Manifest]
"""Waits for the parcel's bytes and returns its manifest; runs outside the model thread, which has the next prompt."""


class PrefillCompute:
    """Turns a prompt into a first token and a parcel. One thread at a time."""

    def __init__(
        self,
        engine: PrefillEngine,
        tokenizer: Any,
        spec: VLMSpec,
        identity: ModelIdentity,
        metrics: PrefillMetrics,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._spec = spec
        self._identity = identity
        self._metrics = metrics

    def run(self, job: PrefillJob, prompt: Prompt, body: memoryview, emit: Emit) -> Completion | None:
        """Computes one job.

        Args:
            body: Where the parcel is written; at least as long as the budget's bound.
            emit: Called with the first token as soon as it is known, then with the compression.

        Returns:
            What completes the parcel, or None when the first token ends the answer and nothing need be shipped.

        Raises:
            RequestCancelledError: The job was cancelled.
        """
        return self.compress(job, prompt, self.prefill([job], prompt, job.cancelled), body, emit)

    def prefill(self, jobs: Iterable[PrefillJob], prompt: Prompt, cancelled: threading.Event) -> Prefilled:
        """One pass over a prompt that `compress` may use for each of the jobs: equal statistics are measured once.

        Args:
            jobs: One alone where its policy needs a pass of its own.

        Raises:
            RequestCancelledError: `cancelled` was set.
        """
        jobs = list(jobs)
        needed = (statistics_for(job.policy, prompt.shape) for job in jobs if not _keeps_all(job, prompt))
        wired = (wire_statistics(job.wire) for job in jobs)
        statistics = dict.fromkeys(chain.from_iterable(chain(needed, wired)))
        prefilled = self._engine.prefill(prompt, statistics, cancelled, self._sparse(jobs, prompt))
        for stage, seconds in prefilled.seconds.items():
            self._metrics.observe_stage(stage, seconds)
        return prefilled

    def compress(
        self, job: PrefillJob, prompt: Prompt, prefilled: Prefilled, body: memoryview, emit: Emit
    ) -> Completion | None:
        """From a pass to a first token and a parcel; see `run`. The pass stays as it is.

        Args:
            prefilled: A pass over the prompt that was made for this job, among others perhaps.
        """
        first = self._first_token(job, prompt, prefilled.logits)
        emit(first)
        if first.finish_reason:
            return None
        started = time.monotonic()
        if _keeps_all(job, prompt):
            selections = keep_everything(self._identity.layout.num_layers)
        else:
            selections = select_tokens(job.policy, prefilled.observed(prompt.shape), job.budget)
        num_kept = kept_counts(prefilled, selections)
        layout = self._identity.layout
        eviction = eviction_for(job.policy, prompt.shape, job.budget, selections, layout.num_kv_heads)
        written = write_kept(prefilled, selections, num_kept, layout, job.wire, body)
        if eviction is not None and eviction.carries_scores:
            scored = prefilled.observed(prompt.shape)
            written = replace(written, body=add_scores(job.policy, scored, selections, written.body, body))
        draft = self._draft(job, prompt, num_kept, selections, first.token, written, eviction)
        self._metrics.observe_stage("select", time.monotonic() - started)
        emit(Compressed(message=self._report(draft, prompt)))
        return partial(_complete, draft, written)

    def _sparse(self, jobs: Sequence[PrefillJob], prompt: Prompt) -> SparsePrefill | None:
        if not any(job.policy.needs_own_pass and not _keeps_all(job, prompt) for job in jobs):
            return None
        assert len(jobs) == 1, "a policy that changes the pass shares it with no other"
        (job,) = jobs
        return sparse_prefill_for(job.policy, prompt.shape, job.budget, self._identity.layout.num_layers)

    def _first_token(self, job: PrefillJob, prompt: Prompt, logits: torch.Tensor) -> FirstToken:
        sampling = job.sampling
        token = sample(logits, sampling, prompt.next_position)
        text = TextStream(self._tokenizer, sampling.stop)
        delta = text.push(token)
        reason = public.FINISH_REASON_UNSPECIFIED
        if text.stopped or (token in self._spec.eos_token_ids and not sampling.ignore_eos):
            reason = public.FINISH_REASON_STOP
        elif sampling.max_new_tokens == 1:
            reason = public.FINISH_REASON_LENGTH
        if reason:
            delta += text.finish()
        return FirstToken(
            token=token,
            text=delta,
            finish_reason=reason,
            prompt_tokens=prompt.shape.num_tokens,
            visual_tokens=prompt.shape.num_visual,
        )

    def _draft(
        self,
        job: PrefillJob,
        prompt: Prompt,
        num_kept: tuple[int, ...],
        selections: list[Selection],
        first_token: int,
        written: WrittenBody,
        eviction: Eviction | None,
    ) -> Manifest:
        """The manifest without its digest, which needs the body."""
        layout, num_tokens = self._identity.layout, prompt.shape.num_tokens
        return Manifest(
            transfer=job.transfer,
            model=self._identity.name,
            compatibility=self._identity.compatibility,
            layout=layout,
            num_kept=num_kept,
            logical_length=num_tokens,
            next_position=prompt.next_position,
            policy=job.policy.name,
            requested_retention=float(asked_retention(prompt.shape, job.budget)),
            realised_retention=layout.realised_retention(num_kept, num_tokens),
            layer_attention_mass=tuple(selection.attention_mass for selection in selections),
            body_bytes=len(written.body),
            digest=b"",
            first_token=first_token,
            sampling=job.sampling,
            encoding=written.encoding,
            eviction=eviction,
        )

    def _report(self, manifest: Manifest, prompt: Prompt) -> public.Compression:
        layout, mass = manifest.layout, manifest.layer_attention_mass
        tokens = layer_tokens(manifest.num_kept, layout)
        self._metrics.attention_mass.observe(sum(mass) / len(mass))
        for layer, kept in enumerate(tokens):
            gauge = self._metrics.labelled(self._metrics.layer_retention, layer=str(layer))
            gauge.set(kept / manifest.logical_length)
        return public.Compression(
            policy=manifest.policy,
            requested_retention=manifest.requested_retention,
            realised_retention=manifest.realised_retention,
            full_bytes=layout.full_bytes(manifest.logical_length),
            kept_bytes=layout.body_bytes(manifest.num_kept),
            layer_tokens=tokens,
            layer_attention_mass=mass,
            prompt_tokens=prompt.shape.num_tokens,
            visual_tokens=prompt.shape.num_visual,
        )


def _keeps_all(job: PrefillJob, prompt: Prompt) -> bool:
    """Retention 1 bypasses every policy."""
    return asked_retention(prompt.shape, job.budget) >= 1


def _complete(draft: Manifest, written: WrittenBody) -> Manifest:
    written.arrival()
    return replace(draft, digest=body_digest(written.body))
