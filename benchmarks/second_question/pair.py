"""One pair of questions: its passes, and the parcels of the second one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, product

import torch

from benchmarks.local_pipeline import LocalParcel, LocalPipeline, local_job
from benchmarks.quality.runner import messages_for
from benchmarks.quality.setting import FULL as UNTOUCHED
from benchmarks.quality.setting import Setting
from benchmarks.second_question.config import SecondQuestionConfig
from benchmarks.second_question.outcome import FULL, OTHER, OWN, PREFIX, SAME, Agreement
from benchmarks.second_question.prefix import Prefix, Queries, prefix_tokens
from benchmarks.second_question.reuse import Choice, Repeated, watched
from benchmarks.second_question.text_pass import TextEngine
from models.shapes_vlm.pairs import Pair
from prefill_worker.compression.pipeline import statistics_for
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.registry import DEFAULT_POLICY, build_policy
from prefill_worker.compression.statistics import Statistic
from prefill_worker.engine.engine import Prefilled
from prefill_worker.prompt import Prompt
from shared.request.params import Budget


@dataclass(frozen=True, kw_only=True)
class Way:
    """A parcel of the second question, and how it came about."""

    name: str
    setting: Setting
    parcel: LocalParcel


@dataclass(eq=False, kw_only=True)
class PairInPasses:
    """The owner of one pair's KV; parcels are made one by one, as they are asked for.

    Attributes:
        agreements: One per setting, when all parcels are made.
        first: The first question's prompt.
        second: The second one's.
        prefix: Of both.
    """

    pipeline: LocalPipeline
    engine: TextEngine
    config: SecondQuestionConfig
    pair: Pair
    agreements: list[Agreement] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.first, self.second = (
            self.pipeline.build(messages_for(sample), max_new_tokens=self.config.max_new_tokens) for sample in self.pair
        )
        _check_common(self.first, self.second)
        self._settings = {
            Setting(contender.label, retention): (contender.policy_for(self.pair[1], self.second.shape), budget)
            for contender, (retention, budget) in product(self.config.contenders, self.config.budgets.items())
        }
        self._before = self._whole(self.first)
        self._own = self._whole(self.second)
        self.prefix = Prefix.of(self.first, self._before)

    def ways(self) -> Iterator[Way]:
        """All parcels of the second question."""
        full = build_policy(DEFAULT_POLICY, {})
        untouched = self._parcel(self.second, self._own, full, Budget(retention=1.0))
        yield Way(name=FULL, setting=UNTOUCHED, parcel=untouched)
        from_prefix = self.engine.prefill_text(self.second, self.prefix, self._statistics(self.second))
        for setting, (policy, budget) in self._settings.items():
            own, again, before = Choice(), Choice(), Choice()
            parcel = self._parcel(self.second, self._own, watched(policy, own), budget)
            yield Way(name=OWN, setting=setting, parcel=parcel)
            parcel = self._parcel(self.second, from_prefix, watched(policy, again), budget)
            yield Way(name=PREFIX, setting=setting, parcel=parcel)
            yield Way(name=SAME, setting=setting, parcel=self._repeated(own))
            self._parcel(self.first, self._before, watched(policy, before), budget)
            yield Way(name=OTHER, setting=setting, parcel=self._repeated(before))
            self.agreements.append(_agreement(setting, own, again))

    def _repeated(self, choice: Choice) -> LocalParcel:
        seen = [chosen[:, : self.prefix.num_tokens] for chosen in choice]
        policy = Repeated()
        prefilled = self.engine.prefill_text(self.second, self.prefix, statistics_for(policy, self.second.shape), seen)
        # whatever is less than everything: the policy does not ask
        return self._parcel(self.second, prefilled, policy, Budget(max_kept_tokens=self.second.shape.num_tokens - 1))

    def _parcel(self, prompt: Prompt, prefilled: Prefilled, policy: Policy, budget: Budget) -> LocalParcel:
        job = local_job(policy, budget, max_new_tokens=self.config.max_new_tokens)
        return self.pipeline.compress(prompt, prefilled, job)

    def _whole(self, prompt: Prompt) -> Prefilled:
        return self.engine.prefill(prompt, (*self._statistics(prompt), Queries()), threading.Event())

    def _statistics(self, prompt: Prompt) -> tuple[Statistic[object], ...]:
        needed = (statistics_for(policy, prompt.shape) for policy, _ in self._settings.values())
        return tuple(dict.fromkeys(chain.from_iterable(needed)))


def _check_common(first: Prompt, second: Prompt) -> None:
    """The prompts must be equal up to the last visual token, or the second one cannot use the first one's prefix."""
    images, other = prefix_tokens(first.shape), prefix_tokens(second.shape)
    alike = torch.equal(first.inputs["input_ids"][:, :images], second.inputs["input_ids"][:, :other])
    if not (alike and torch.equal(first.inputs["pixel_values"], second.inputs["pixel_values"])):
        raise ValueError("the model's prompts differ before their last image token")


def _agreement(setting: Setting, own: Choice, again: Choice) -> Agreement:
    pairs = list(zip(own, again, strict=True))
    return Agreement(
        setting=setting,
        kept=sum(int(one.sum()) for one, _ in pairs),
        common=sum(int((one & other).sum()) for one, other in pairs),
    )
