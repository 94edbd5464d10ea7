"""Asks the questions: one prefill per question, then every policy and retention from what it gave."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, product

from PIL import Image
from vlcache.v1 import inference_pb2 as public

from benchmarks.local_decoding import Track
from benchmarks.local_pipeline import LocalPipeline, local_job
from benchmarks.quality.config import QualityConfig
from benchmarks.quality.outcome import Outcome, is_right, outcome_of
from benchmarks.quality.trial import FULL, Question, Setting, Trial
from models.shapes_vlm.questions import Sample, draw_samples
from prefill_worker.compression.registry import DEFAULT_POLICY, build_policy
from prefill_worker.job import PrefillJob
from prefill_worker.prompt import Prompt
from shared.request.params import Budget, Sampling

# Whose keys, values and statistics are held at once.
QUESTIONS_AT_ONCE = 16


class QualityRunner:
    """Owner of the pipeline for one configuration."""

    def __init__(self, config: QualityConfig) -> None:
        self._config = config
        self._sampling = Sampling(max_new_tokens=config.max_new_tokens)
        self._full = local_job(build_policy(DEFAULT_POLICY, {}), Budget(retention=1.0), self._sampling)
        self._pipeline = LocalPipeline(
            config.model,
            dtype=config.dtype,
            threads=config.threads,
            kv_memory_mib=config.kv_memory_mib,
            max_batch=config.batch,
        )

    def outcomes(self) -> Iterator[Outcome]:
        """Every question under the full cache and under every setting, as they become known."""
        samples = draw_samples(seed=self._config.seed, count=self._config.samples, tasks=self._config.tasks)
        while drawn := list(islice(samples, QUESTIONS_AT_ONCE)):
            yield from self._compare([self._ask(sample) for sample in drawn])

    def _ask(self, sample: Sample) -> Question:
        prompt = self._pipeline.build(messages_for(sample), max_new_tokens=self._config.max_new_tokens)
        jobs = self._jobs(sample, prompt)
        prefilled = self._pipeline.prefill(prompt, list(jobs.values()))
        return Question(sample=sample, prompt=prompt, jobs=jobs, prefilled=prefilled)

    def _jobs(self, sample: Sample, prompt: Prompt) -> dict[Setting, PrefillJob]:
        """One per setting; those of a contender follow each other."""
        jobs = {}
        for contender, (retention, budget) in product(self._config.contenders, self._config.budgets.items()):
            policy = contender.policy_for(sample, prompt.shape)
            jobs[Setting(contender.label, retention)] = local_job(policy, budget, self._sampling)
        return jobs

    def _compare(self, questions: Sequence[Question]) -> Iterator[Outcome]:
        references = {}
        for trial in self._decode(self._full_trials(questions)):
            references[trial.question] = trial.answer
            yield self._outcome(trial)
        for question in questions:
            if question not in references:
                yield from self._outcomes_of_first_token(question)
        for trial in self._decode(self._trials(references)):
            yield self._outcome(trial)

    def _full_trials(self, questions: Iterable[Question]) -> Iterator[Trial]:
        for question in questions:
            parcel = self._pipeline.compress(question.prompt, question.prefilled, self._full)
            if parcel is not None:
                yield Trial(question=question, setting=FULL, parcel=parcel)

    def _trials(self, references: dict[Question, Track]) -> Iterator[Trial]:
        for question, reference in references.items():
            for setting, job in question.jobs.items():
                parcel = self._pipeline.compress(question.prompt, question.prefilled, job)
                assert parcel is not None, "the first token does not depend on what is kept"
                yield Trial(question=question, setting=setting, parcel=parcel, reference=reference)

    def _decode(self, trials: Iterator[Trial]) -> Iterator[Trial]:
        """Each trial when all is known of it; parcels are made when there is a place in the batch."""
        decoding, decoded = self._pipeline.decoding, dict[Track, Trial]()
        while True:
            for trial in islice(trials, decoding.num_places):
                self._begin(trial, decoded)
            if decoding.idle:
                return
            for track in decoding.step():
                trial = decoded.pop(track)
                trial.take(track)
                if not self._begin(trial, decoded):
                    yield trial

    def _begin(self, trial: Trial, decoded: dict[Track, Trial]) -> bool:
        """Adds the trial's next track; False when there is none."""
        track = trial.next_track()
        if track is None:
            return False
        decoded[track] = trial
        self._pipeline.decoding.add(track)
        return True

    def _outcome(self, trial: Trial) -> Outcome:
        return outcome_of(trial, self._pipeline.text(trial.answer.drawn))

    def _outcomes_of_first_token(self, question: Question) -> Iterator[Outcome]:
        token = int(question.prefilled.logits.argmax())
        right = is_right(self._pipeline.text([token]), question.sample.answer)
        for setting in (FULL, *question.jobs):
            yield Outcome(setting=setting, task=question.sample.task, right=right)


def messages_for(sample: Sample) -> list[public.Message]:
    """The sample as a chat request."""
    parts = [public.Part(image=public.Image(data=_png(image))) for image in sample.images]
    return [public.Message(role="user", parts=[*parts, public.Part(text=sample.question)])]


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()
