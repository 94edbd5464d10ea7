"""A question, and one parcel of it on its way to an answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.local_decoding import Track
from benchmarks.local_pipeline import LocalParcel
from benchmarks.quality.setting import Setting
from models.shapes_vlm.questions import Sample
from prefill_worker.engine.engine import Prefilled
from prefill_worker.job import PrefillJob
from prefill_worker.prompt import Prompt


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """A question with a job per setting.

    Attributes:
        number: In the order in which the questions are drawn.
        prefilled: The pass that all jobs share whose policies need none of their own.
    """

    number: int
    sample: Sample
    prompt: Prompt
    jobs: dict[Setting, PrefillJob]
    prefilled: Prefilled


@dataclass(kw_only=True, eq=False)
class Trial:
    """One parcel of a question.

    It is decoded along the full cache's answer first. As long as it draws the tokens of that answer, this is what it
    would have answered; where they part, it is decoded again, freely.

    Attributes:
        first_logits: [vocab] fp32, of the first token, which its pass gave.
        reference: The trial under the full cache, when all is known of it; None when this is that trial, and only
            decodes freely.
        forced: The track along the reference, when it has ended.
        free: The track that follows nothing, when it has ended.
    """

    question: Question
    setting: Setting
    parcel: LocalParcel
    first_logits: torch.Tensor
    reference: Trial | None = None
    forced: Track | None = None
    free: Track | None = None

    @property
    def answer(self) -> list[int]:
        """The tokens of its answer, when all is known."""
        track = self.free or self.forced
        assert track is not None
        return track.drawn

    def next_track(self) -> Track | None:
        """What is to be decoded now; None when all is known."""
        while (track := self._missing()) is not None and track.ended:
            self.take(track)
        return track

    def take(self, track: Track) -> None:
        """Takes a track that has ended."""
        if track.along is None:
            self.free = track
        else:
            self.forced = track

    def _missing(self) -> Track | None:
        if self.reference is not None and self.forced is None:
            return self.parcel.track(along=tuple(self.reference.answer))
        parted = self.reference is None or self.forced is None or self.forced.drawn != self.reference.answer
        return self.parcel.track() if parted and self.free is None else None
