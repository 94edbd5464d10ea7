"""Asks the questions: one prefill per question, then every policy and retention from what it gave."""

from __future__ import annotations

import io
import logging
from collections import deque
from collections.abc import Iterator
from itertools import product

from PIL import Image
from vlcache.v1 import inference_pb2 as public

from benchmarks.local_decoding import Track
from benchmarks.local_pipeline import NO_GUARD, LocalPipeline, local_job
from benchmarks.quality.config import QualityConfig
from benchmarks.quality.contenders import Contender
from benchmarks.quality.outcome import Outcome, outcome_of
from benchmarks.quality.setting import FULL, Setting
from benchmarks.quality.trial import Question, Trial
from models.shapes_vlm.held_out import draw_any
from models.shapes_vlm.questions import Sample
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.registry import DEFAULT_POLICY, build_policy
from prefill_worker.engine.engine import Prefilled
from prefill_worker.job import PrefillJob
from prefill_worker.prompt import Prompt
from shared.errors import InvalidRequestError
from shared.request.params import Budget, Guard

log = logging.getLogger(__name__)

# Whose keys, values and statistics are held at once.
OPEN_QUESTIONS = 32


class QualityRunner:
    """Owner of the pipeline for one configuration, and of the questions in it.

    A question is open from its pass until all its parcels are made. Its trial under the full cache comes first, those
    of the settings when that one has ended.
    """

    def __init__(self, config: QualityConfig) -> None:
        self._config = config
        self._full = self._job(build_policy(DEFAULT_POLICY, {}), Budget(retention=1.0))
        self._pipeline = LocalPipeline(
            config.model,
            dtype=config.dtype,
            threads=config.threads,
            kv_memory_mib=config.kv_memory_mib,
            max_num_seqs=config.batch,
        )
        self._contenders = [contender for contender in config.contenders if self._runs(contender)]
        self.settings = config.settings(self._contenders)
        """All that is compared with the full cache."""
        self._samples = enumerate(draw_any(seed=config.seed, count=config.samples, tasks=config.tasks))
        self._of_track: dict[Track, Trial] = {}
        self._compressed: deque[Iterator[Trial]] = deque()
        self._num_open = 0

    def outcomes(self) -> Iterator[Outcome]:
        """Every question under the full cache and under every setting, as they become known."""
        while True:
            yield from self._fill()
            if self._pipeline.decoding.idle:
                return
            for track in self._pipeline.decoding.step():
                trial = self._of_track.pop(track)
                trial.take(track)
                yield from self._go_on(trial)

    def _fill(self) -> Iterator[Outcome]:
        """Fills the batch: with compressed trials as long as there are any, so that few questions are open."""
        while self._pipeline.decoding.num_places:
            if self._compressed:
                yield from self._begin_compressed()
            elif self._num_open < OPEN_QUESTIONS and (drawn := next(self._samples, None)) is not None:
                self._num_open += 1
                yield from self._go_on(self._full_trial(self._ask(*drawn)))
            else:
                return

    def _begin_compressed(self) -> Iterator[Outcome]:
        trial = next(self._compressed[0], None)
        if trial is None:
            self._compressed.popleft()
            self._num_open -= 1
        else:
            yield from self._go_on(trial)

    def _go_on(self, trial: Trial) -> Iterator[Outcome]:
        """Decodes what is missing, or says what is known."""
        track = trial.next_track()
        if track is not None:
            self._of_track[track] = trial
            self._pipeline.decoding.add(track)
            return
        yield outcome_of(trial, self._pipeline.text(trial.answer))
        if trial.reference is None:
            self._compressed.append(self._trials(trial))

    def _trials(self, reference: Trial) -> Iterator[Trial]:
        """One per setting; each parcel is made when there is a place for it."""
        question = reference.question
        for setting, job in question.jobs.items():
            prefilled = question.prefilled
            if job.policy.needs_own_pass:
                prefilled = self._pipeline.prefill(question.prompt, [job])
            yield self._trial(question, setting, job, prefilled, reference)

    def _full_trial(self, question: Question) -> Trial:
        return self._trial(question, FULL, self._full, question.prefilled, None)

    def _trial(
        self, question: Question, setting: Setting, job: PrefillJob, prefilled: Prefilled, reference: Trial | None
    ) -> Trial:
        parcel = self._pipeline.compress(question.prompt, prefilled, job)
        return Trial(
            question=question, setting=setting, parcel=parcel, first_logits=prefilled.logits, reference=reference
        )

    def _ask(self, number: int, sample: Sample) -> Question:
        prompt = self._pipeline.build(messages_for(sample), max_new_tokens=self._config.max_new_tokens)
        jobs = self._jobs(sample, prompt)
        prefilled = self._pipeline.prefill(prompt, [job for job in jobs.values() if not job.policy.needs_own_pass])
        return Question(number=number, sample=sample, prompt=prompt, jobs=jobs, prefilled=prefilled)

    def _runs(self, contender: Contender) -> bool:
        """Whether the model allows it, by the first question; one that was named has to run."""
        config = self._config
        sample = next(iter(draw_any(seed=config.seed, count=config.samples, tasks=config.tasks)))
        prompt = self._pipeline.build(messages_for(sample), max_new_tokens=config.max_new_tokens)
        try:
            policy = contender.policy_for(sample, prompt.shape).for_checkpoint(self._pipeline.sharing)
            job = self._job(policy, config.budgets[min(config.budgets)])
            self._pipeline.compress(prompt, self._pipeline.prefill(prompt, [job]), job)
        except InvalidRequestError as error:
            if not contender.optional:
                raise
            log.warning("%s is left out: %s", contender.label, error.message)
            return False
        return True

    def _jobs(self, sample: Sample, prompt: Prompt) -> dict[Setting, PrefillJob]:
        config = self._config
        compared = product(self._contenders, config.budgets.values(), config.guards)
        sharing = self._pipeline.sharing
        jobs = [
            self._job(each.policy_for(sample, prompt.shape).for_checkpoint(sharing), budget, guard)
            for each, budget, guard in compared
        ]
        return dict(zip(self.settings, jobs, strict=True))

    def _job(self, policy: Policy, budget: Budget, guard: Guard = NO_GUARD) -> PrefillJob:
        return local_job(policy, budget, max_new_tokens=self._config.max_new_tokens, guard=guard)


def messages_for(sample: Sample) -> list[public.Message]:
    """The sample as a chat request; images come with its first question."""
    images = [public.Part(image=public.Image(data=_png(image))) for image in sample.images]
    turns = [text for turn in sample.before for text in turn]
    messages = [
        public.Message(role="assistant" if at % 2 else "user", parts=[public.Part(text=text)])
        for at, text in enumerate((*turns, sample.question))
    ]
    return [public.Message(role="user", parts=[*images, *messages[0].parts]), *messages[1:]]


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="PNG", compress_level=1)
    return out.getvalue()
