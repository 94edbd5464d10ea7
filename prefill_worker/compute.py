"""What happens in the model thread: prefill -> first tokens -> [look ahead] -> selection -> parcel."""

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

from prefill_worker.compression.cascade import Cascade
from prefill_worker.compression.eviction import add_scores, eviction_for
from prefill_worker.compression.key_channels import wire_statistics
from prefill_worker.compression.pipeline import (
    Selection,
    asked_retention,
    sparse_prefill_for,
    statistics_for,
)
from prefill_worker.compression.sparse.prefill import SparsePrefill
from prefill_worker.compression.windows import seen_bitmaps, seen_parts
from prefill_worker.engine.engine import Prefilled, PrefillEngine
from prefill_worker.guard import GUARD_TOKENS, MoreRoom, choose, no_more_room, outcome_name
from prefill_worker.job import Compressed, Event, FirstToken, NextToken, PrefillJob
from prefill_worker.opening import Opening
from prefill_worker.parcel.early_rows import Early, EarlyRows
from prefill_worker.parcel.kept_tokens import kept_report, token_bitmaps
from prefill_worker.parcel.wire_stage import WrittenBody, write_kept
from prefill_worker.parcel.writer import kept_counts
from prefill_worker.prompt import Prompt
from shared.errors import RequestCancelledError, at_stage
from shared.kv.eviction import Eviction
from shared.kv.layout import KVLayout
from shared.kv.manifest import BegunAnswer, Manifest, layer_tokens
from shared.model.identity import ModelIdentity
from shared.model.spec import VLMSpec
from shared.model.support import UnsupportedModelError
from shared.telemetry.metrics import PrefillMetrics

Emit = Callable[[Event], None]
Completion = Callable[[], Manifest]
"""Waits for the parcel's bytes and returns its manifest; runs outside the model thread, which has the next prompt."""


class PrefillCompute:
    """Turns a prompt into a first token and a parcel. One thread at a time.

    Args:
        cascade: Whether layers lose tokens while the pass goes on, where the policy allows it.

    Raises:
        UnsupportedModelError: `cascade` with a model whose layers have windows.
    """

    def __init__(
        self,
        engine: PrefillEngine,
        tokenizer: Any,
        spec: VLMSpec,
        identity: ModelIdentity,
        metrics: PrefillMetrics,
        *,
        cascade: bool = False,
    ) -> None:
        if cascade and identity.layout.windows:
            raise UnsupportedModelError("cascade is not offered for a model with sliding windows: it drops too early")
        self._engine = engine
        self._tokenizer = tokenizer
        self._spec = spec
        self._identity = identity
        self._metrics = metrics
        self._cascades = cascade

    def run(
        self,
        job: PrefillJob,
        prompt: Prompt,
        body: memoryview,
        emit: Emit,
        more_room: MoreRoom = no_more_room,
        early: Early | None = None,
    ) -> Completion | None:
        """Computes one job.

        Args:
            body: Where the parcel is written; at least as long as the budget's bound.
            emit: Called with the first tokens as soon as they are known, then with the compression.
            more_room: Asked where the quality guard wants a larger budget.
            early: Takes rows that can leave before the parcel is written, as that writes them, too.

        Returns:
            What completes the parcel, or None when the first tokens end the answer and nothing need be shipped.

        Raises:
            RequestCancelledError: The job was cancelled.
        """
        prefilled = self.prefill([job], prompt, job.cancelled, early)
        return self.compress(job, prompt, prefilled, body, emit, more_room)

    def prefill(
        self, jobs: Iterable[PrefillJob], prompt: Prompt, cancelled: threading.Event, early: Early | None = None
    ) -> Prefilled:
        """One pass over a prompt that `compress` may use for each of the jobs: equal statistics are measured once.

        Args:
            jobs: One alone where its policy needs a pass of its own.
            early: See `run`.

        Raises:
            RequestCancelledError: `cancelled` was set.
        """
        jobs = list(jobs)
        needed = (statistics_for(job.policy, prompt.shape) for job in jobs if not _keeps_all(job, prompt))
        wired = (wire_statistics(job.wire) for job in jobs)
        statistics = dict.fromkeys(chain.from_iterable(chain(needed, wired)))
        sparse, cascade = self._sparse(jobs, prompt), self._cascade(jobs, prompt)
        rows = _early_rows(jobs, cascade, early)
        prefilled = self._engine.prefill(prompt, statistics, cancelled, sparse, cascade, rows)
        self._metrics.observe_stages(prefilled.seconds)
        full_bytes = self._identity.layout.full_bytes(prompt.shape.num_tokens)
        self._metrics.prefill_peak.observe(prefilled.peak_kv_bytes / full_bytes)
        self._count_known(prompt, prefilled)
        return prefilled

    def compress(
        self,
        job: PrefillJob,
        prompt: Prompt,
        prefilled: Prefilled,
        body: memoryview,
        emit: Emit,
        more_room: MoreRoom = no_more_room,
    ) -> Completion | None:
        """From a pass to a first token and a parcel; see `run`. The pass stays as it is.

        Args:
            prefilled: A pass over the prompt that was made for this job, among others perhaps.
        """
        openings = [self._opening(job, prompt, choice) for choice in range(job.sampling.n)]
        for opening in openings:
            emit(FirstToken.of(opening.draw(prefilled.logits), prompt.shape, opening.choice))
        going = [opening for opening in openings if not opening.ended]
        if not going:
            return None
        if steps := _steps_ahead(job, prompt, prefilled):
            looked = self._look_ahead(job, prompt, prefilled, steps, going[0], emit)
            if going[0].ended:
                # to the others its tokens are no part of the prompt
                looked = replace(looked, keys=prefilled.keys, values=prefilled.values)
                going = going[1:]
                if not going:
                    return None
            prefilled = looked
        with at_stage("select"):
            return self._write(job, prompt, prefilled, going, body, emit, more_room)

    def _write(
        self,
        job: PrefillJob,
        prompt: Prompt,
        prefilled: Prefilled,
        going: Sequence[Opening],
        body: memoryview,
        emit: Emit,
        more_room: MoreRoom,
    ) -> Completion:
        """Chooses what is kept and begins to write it.

        Args:
            going: The answers that have not ended; only the first may have more than one token.
        """
        started, layout = time.monotonic(), self._identity.layout
        choice = choose(job, prompt.shape, prefilled, body, more_room, layout.windows)
        job, body = replace(job, budget=choice.budget), choice.body
        shared, selections = _shipped(choice.selections, layout, prefilled.keys, going)
        if prefilled.early is not None:
            prefilled.early.placed(selections)
        num_kept = kept_counts(prefilled, selections)
        eviction = eviction_for(job.policy, prompt.shape, job.budget, selections, layout.num_kv_heads)
        written = write_kept(prefilled, selections, num_kept, layout, job.wire, body)
        if eviction is not None and eviction.carries_scores:
            scored = prefilled.observed(prompt.shape)
            written = replace(written, body=add_scores(job.policy, scored, selections, written.body, body))
        draft = self._draft(job, prompt, num_kept, selections, going, written, eviction)
        draft = replace(draft, seen_tokens=seen_bitmaps(shared, layout, draft.seen_length))
        self._metrics.observe_stage(
            "select",
            time.monotonic() - started,
            policy=draft.policy,
            retention=draft.realised_retention,
            kv_full_bytes=layout.full_bytes(draft.logical_length),
            kv_kept_bytes=layout.body_bytes(num_kept),
        )
        emit(Compressed(message=self._report(draft, prompt, choice.outcome)))
        return partial(_complete, draft, written)

    def _count_known(self, prompt: Prompt, prefilled: Prefilled) -> None:
        self._metrics.vision_cache_hits.inc(prefilled.known_images)
        self._metrics.vision_cache_misses.inc(len(prompt.views) - prefilled.known_images)
        if prefilled.known_tokens:
            self._metrics.prefix_cache_hits.inc()
        elif prompt.views:
            self._metrics.prefix_cache_misses.inc()

    def _sparse(self, jobs: Sequence[PrefillJob], prompt: Prompt) -> SparsePrefill | None:
        if not any(job.policy.needs_own_pass and not _keeps_all(job, prompt) for job in jobs):
            return None
        assert len(jobs) == 1, "a policy that changes the pass shares it with no other"
        (job,) = jobs
        return sparse_prefill_for(job.policy, prompt.shape, job.budget, self._identity.layout.num_layers)

    def _cascade(self, jobs: Sequence[PrefillJob], prompt: Prompt) -> Cascade | None:
        """For one job alone, and where its final choice needs no KV that was given up before."""
        if not self._cascades or len(jobs) != 1:
            return None
        (job,) = jobs
        # a guard decodes ahead, and it may want more than the budget
        if job.guard.on or _keeps_all(job, prompt) or not job.policy.for_prompt(prompt.shape).monotone:
            return None
        return Cascade(job.policy, prompt.shape, job.budget, self._identity.layout.num_layers)

    def _opening(self, job: PrefillJob, prompt: Prompt, choice: int) -> Opening:
        return Opening(
            self._tokenizer,
            job.sampling,
            self._spec.eos_token_ids,
            prompt.next_position,
            choice,
            delivered=job.delivered_of(choice),
            prompt_tokens=_tokens_to_punish(job, prompt),
            grammar=job.grammar,
        )

    def _look_ahead(
        self, job: PrefillJob, prompt: Prompt, prefilled: Prefilled, steps: int, opening: Opening, emit: Emit
    ) -> Prefilled:
        """Tokens after the first, over the full KV: part of the answer, or drafts of which only the attention stays."""
        started, policy = time.monotonic(), job.policy
        if job.hands_over(1 + steps):
            looked = self._ahead_of(job, prompt, prefilled, steps, opening, emit)
        else:
            # a lost attempt has drafted the rest over the full KV, whatever was drawn over the kept one
            begun = replace(job, delivered=tuple(tokens[:1] for tokens in job.delivered))
            drafts = self._opening(begun, prompt, opening.choice)
            drafts.draw(prefilled.logits)
            drafted = self._ahead_of(job, prompt, prefilled, steps, drafts, lambda _: None)
            # a policy that does not look ahead is not shown what the guard has drafted
            looked = replace(prefilled, ahead=drafted.ahead if policy.look_ahead else (), peaks=drafted.peaks)
        self._metrics.observe_stage("look_ahead", time.monotonic() - started)
        return looked

    def _ahead_of(
        self, job: PrefillJob, prompt: Prompt, prefilled: Prefilled, steps: int, opening: Opening, emit: Emit
    ) -> Prefilled:
        def draw(logits: torch.Tensor) -> int | None:
            if job.cancelled.is_set():
                raise RequestCancelledError("cancelled while looking ahead")
            drawn = opening.draw(logits)
            emit(NextToken.of(drawn, opening.choice))
            return None if drawn.finish_reason else drawn.token

        (first,) = opening.tokens
        return self._engine.look_ahead(prefilled, first, prompt.next_position, steps, draw)

    def _draft(
        self,
        job: PrefillJob,
        prompt: Prompt,
        num_kept: tuple[int, ...],
        selections: list[Selection],
        going: Sequence[Opening],
        written: WrittenBody,
        eviction: Eviction | None,
    ) -> Manifest:
        """The manifest without its digest, which needs the body, and without what is seen through windows."""
        first, *others = going
        layout, fed = self._identity.layout, len(first.tokens) - 1
        num_tokens = prompt.shape.num_tokens + fed
        return Manifest(
            transfer=job.transfer,
            model=self._identity.name,
            compatibility=self._identity.compatibility,
            layout=layout,
            num_kept=num_kept,
            logical_length=num_tokens,
            next_position=prompt.next_position + fed,
            policy=job.policy.for_prompt(prompt.shape).name,
            requested_retention=float(asked_retention(prompt.shape, job.budget)),
            realised_retention=layout.realised_retention(num_kept, num_tokens),
            layer_attention_mass=tuple(selection.attention_mass for selection in selections),
            body_bytes=len(written.body),
            digest=b"",
            generated=tuple(first.tokens),
            sampling=job.sampling,
            prompt_token_ids=_tokens_to_punish(job, prompt),
            encoding=written.encoding,
            eviction=eviction,
            kept_tokens=token_bitmaps(selections, layout.num_kv_heads, num_tokens) if job.explain else (),
            choice=first.choice,
            others=tuple(BegunAnswer(other.choice, other.tokens[0]) for other in others),
        )

    def _report(self, manifest: Manifest, prompt: Prompt, guard: public.GuardOutcome) -> public.Compression:
        if guard:
            self._metrics.labelled(self._metrics.guard, outcome=outcome_name(guard)).inc()
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
            kept=kept_report(manifest, prompt),
            guard=guard,
        )


def _early_rows(jobs: Sequence[PrefillJob], cascade: Cascade | None, early: Early | None) -> EarlyRows | None:
    """Where rows travel as they are; only a cascade, which has one job, knows some before the end."""
    if cascade is None or early is None or not jobs[0].wire.plain:
        return None
    return EarlyRows(cascade, early)


def _shipped(
    chosen: Sequence[Selection], layout: KVLayout, keys: Sequence[torch.Tensor], going: Sequence[Opening]
) -> tuple[list[Selection], list[Selection]]:
    """What is seen through windows, and what is shipped: the same, or with the tokens of the first of several answers.

    Several answers go on at different places: what is out of sight for one of them may be in sight for another.
    """
    fed = len(going[0].tokens) - 1
    if len(going) == 1 or not fed:
        shipped = seen_parts([selection.followed_by(fed) for selection in chosen], layout, keys)
        return shipped, shipped
    seen = seen_parts(chosen, layout, [key[:, : key.shape[1] - fed] for key in keys])
    return seen, [selection.followed_by(fed) for selection in seen]


def _keeps_all(job: PrefillJob, prompt: Prompt) -> bool:
    """Retention 1 bypasses every policy."""
    return asked_retention(prompt.shape, job.budget) >= 1


def _steps_ahead(job: PrefillJob, prompt: Prompt, prefilled: Prefilled) -> int:
    """Answer tokens that are decoded before anything is chosen: for the policy, or for the guard alone."""
    if _keeps_all(job, prompt):
        return 0
    drafts = GUARD_TOKENS if job.guard.on and prefilled.has_full_kv else 0
    return job.policy.look_ahead or drafts


def _tokens_to_punish(job: PrefillJob, prompt: Prompt) -> tuple[int, ...]:
    """The prompt's token ids, ascending, each once, where the sampling reads them."""
    return tuple(prompt.inputs["input_ids"].unique().tolist()) if job.sampling.reads_prompt else ()


def _complete(draft: Manifest, written: WrittenBody) -> Manifest:
    written.arrival()
    return replace(draft, digest=draft.digest_of(written.body))
