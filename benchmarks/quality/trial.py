"""A question, and one parcel of it on its way to an answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.local_decoding import Track
from benchmarks.local_pipeline import LocalParcel
from models.shapes_vlm.questions import Sample
from prefill_worker.engine import Prefilled
from prefill_worker.job import PrefillJob
from prefill_worker.prompt import Prompt


@dataclass(frozen=True)
class Setting:
    """What is compared: a policy as it was written, and the kept share that was asked for."""

    policy: str
    retention: float


FULL = Setting("full", 1.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """A question after its pass, with a job per setting."""

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
        reference: The full cache's answer; None when this trial is to find it, and only decodes freely.
        forced: The track along the reference, when it has ended.
    """

    question: Question
    setting: Setting
    parcel: LocalParcel
    reference: Track | None = None
    forced: Track | None = None
    _free: Track | None = field(default=None, init=False)

    @property
    def answer(self) -> Track:
        """What it answers; all is known."""
        answer = self._free or self.forced
        assert answer is not None
        return answer

    def next_track(self) -> Track | None:
        """What is to be decoded now; None when all is known."""
        if self._free is None and self.reference is not None and self.forced is None:
            return self._track(tuple(self.reference.drawn))
        agreed = self.forced is not None and self.forced.along == tuple(self.forced.drawn)
        return None if self._free or agreed else self._track(None)

    def take(self, track: Track) -> None:
        """Takes a track that has ended."""
        if track.along is None:
            self._free = track
        else:
            self.forced = track

    def _track(self, along: tuple[int, ...] | None) -> Track:
        return Track(manifest=self.parcel.manifest, body=self.parcel.body, along=along)
