"""What became of one question under one setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlcache.v1 import inference_pb2 as public

from benchmarks.local_decoding import Track
from benchmarks.quality.setting import Setting
from benchmarks.quality.trial import Trial


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the rows are made of.

    Attributes:
        question: Its number.
        right: Exact match, surrounding white space aside.
        agreement: Share of the full cache's tokens, end of the answer included, that have the same place here.
        gap: Mean over those tokens of log p under the full cache minus log p here, given those before.
        compression: What was kept.
    """

    setting: Setting
    task: str
    question: int
    right: bool
    agreement: float
    gap: float
    compression: public.Compression


def outcome_of(trial: Trial, text: str) -> Outcome:
    """Compares a finished trial with the full cache; `text` is what the client reads."""
    reference, sample = trial.reference or trial, trial.question.sample
    same = [one == other for one, other in zip(reference.answer, trial.answer, strict=False)]
    full = _log_probabilities(reference, reference, ())
    kept = _log_probabilities(trial, reference, full)
    return Outcome(
        setting=trial.setting,
        task=sample.task,
        question=trial.question.number,
        right=text.strip() == sample.answer.strip(),
        agreement=sum(same) / len(reference.answer),
        gap=sum(one - other for one, other in zip(full, kept, strict=True)) / len(full),
        compression=trial.parcel.compression,
    )


def _log_probabilities(trial: Trial, reference: Trial, full: Sequence[float]) -> list[float]:
    """Of the reference's tokens; those that came with the parcel were drawn under the full cache, too."""
    track = trial.forced or trial.free
    assert isinstance(track, Track)
    first = trial.first_logits.log_softmax(dim=-1)[reference.answer[0]].item()
    return [first, *full[1 : len(full) - len(track.log_probabilities)], *track.log_probabilities]
