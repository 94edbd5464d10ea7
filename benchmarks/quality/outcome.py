"""What became of one question under one setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlcache.v1 import inference_pb2 as public

from benchmarks.quality.trial import Setting, Trial


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the rows are made of.

    Attributes:
        right: Exact match, surrounding white space aside.
        agreement: Share of the full answer's tokens that are the same here, the first token aside, which the prefill
            makes; None when there are no others.
        gap: Mean over those tokens of log p under the full cache minus log p under this one, given the full answer
            so far; None as above.
        compression: What was kept; None when the first token ended the answer and nothing was shipped.
    """

    setting: Setting
    task: str
    right: bool
    agreement: float | None = None
    gap: float | None = None
    compression: public.Compression | None = None


def outcome_of(trial: Trial, text: str) -> Outcome:
    """Compares a finished trial with the full cache; `text` is what the client reads."""
    reference, forced = trial.reference or trial.answer, trial.forced or trial.answer
    return Outcome(
        setting=trial.setting,
        task=trial.question.sample.task,
        right=is_right(text, trial.question.sample.answer),
        agreement=_agreement(reference.drawn, trial.answer.drawn),
        gap=_mean_gap(reference.log_probabilities, forced.log_probabilities),
        compression=trial.parcel.compression,
    )


def is_right(text: str, answer: str) -> bool:
    """Exact match, surrounding white space aside."""
    return text.strip() == answer.strip()


def _agreement(reference: Sequence[int], drawn: Sequence[int]) -> float:
    same = sum(one == other for one, other in zip(reference[1:], drawn[1:], strict=False))
    return same / (len(reference) - 1)


def _mean_gap(reference: Sequence[float], forced: Sequence[float]) -> float:
    gaps = [full - kept for full, kept in zip(reference, forced, strict=True)]
    return sum(gaps) / len(gaps)
