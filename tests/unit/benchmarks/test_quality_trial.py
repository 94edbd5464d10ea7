"""A trial's way from a parcel to an outcome, without a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vlcache.v1 import inference_pb2 as public

from benchmarks.local_decoding import Track
from benchmarks.local_pipeline import LocalParcel
from benchmarks.quality.outcome import outcome_of
from benchmarks.quality.setting import FULL, Setting
from benchmarks.quality.trial import Question, Trial
from models.shapes_vlm.questions import Sample
from shared.request.sampling import Sampling
from tests.unit.prefill_worker.manifests import manifest

END = 0
KEPT = Setting("some", 0.1)
LOGITS = torch.tensor([0.0, 1.0, 2.0, 3.0])
NOTHING: Any = None
QUESTION = Question(
    number=0,
    sample=Sample(task="read", images=(), question="?", answer=" right", answer_patches=()),
    prompt=NOTHING,
    jobs={},
    prefilled=NOTHING,
)


def trial(first: int = 3, *, reference: Trial | None = None, limit: int = 8, logits: torch.Tensor = LOGITS) -> Trial:
    parcel = LocalParcel(
        manifest=manifest(generated=(first,), sampling=Sampling(max_new_tokens=limit)),
        body=memoryview(b""),
        compression=public.Compression(),
        eos_token_ids=frozenset({END}),
    )
    setting = KEPT if reference else FULL
    return Trial(question=QUESTION, setting=setting, parcel=parcel, first_logits=logits, reference=reference)


def decode(some: Trial, *drawn: int, chances: float = -0.5) -> Track:
    """Draws these tokens on its next track, which must end with them."""
    track = some.next_track()
    assert track is not None
    for token in drawn:
        assert not track.ended
        track.drawn.append(token)
        track.log_probabilities.append(chances)
    assert track.ended
    some.take(track)
    return track


def full() -> Trial:
    reference = trial()
    decode(reference, 2, 1, END)
    assert reference.next_track() is None
    assert reference.answer == [3, 2, 1, END]
    return reference


def test_what_follows_the_reference_by_itself_is_decoded_once() -> None:
    some = trial(reference=full())
    track = decode(some, 2, 1, END)
    assert track.along == (3, 2, 1, END)
    assert some.next_track() is None
    assert some.answer == [3, 2, 1, END]


def test_what_parts_from_the_reference_is_decoded_again_freely() -> None:
    some = trial(reference=full())
    assert decode(some, 2, 2, END).last_fed == END
    again = decode(some, 2, 2, 3, END)
    assert again.along is None
    assert some.next_track() is None
    assert some.answer == [3, 2, 2, 3, END]


def test_the_reference_is_fed_whatever_is_drawn_even_first() -> None:
    some = trial(1, reference=full())
    track = some.next_track()
    assert track is not None
    fed = [track.last_fed]
    for _ in range(3):
        track.drawn.append(1)
        fed.append(track.last_fed)
    assert fed == [3, 2, 1, END]
    assert track.ended


def test_an_answer_that_its_first_token_ends_needs_no_step() -> None:
    reference = trial(END)
    assert reference.next_track() is None
    assert reference.answer == [END]
    same, other = trial(END, reference=reference), trial(3, reference=reference)
    assert same.next_track() is None
    assert same.answer == [END]
    decode(other, END)
    assert other.answer == [3, END]


def test_a_free_track_ends_at_the_limit() -> None:
    reference = trial(limit=3)
    decode(reference, 2, 2)
    assert reference.answer == [3, 2, 2]


def test_the_full_cache_agrees_with_itself() -> None:
    found = outcome_of(full(), "right")
    assert (found.setting, found.task, found.agreement, found.gap, found.right) == (FULL, "read", 1.0, 0.0, True)


@pytest.mark.parametrize(
    ("freely", "agreement"),
    [([2, 2, 1, END], 2 / 4), ([2, 3, END], 3 / 4), ([END], 1 / 4), ([2, 2, 2, 2, 2, 2, 2], 2 / 4)],
)
def test_agreement_counts_equal_tokens_up_to_the_full_answers_length(freely: list[int], agreement: float) -> None:
    some = trial(reference=full())
    decode(some, *(freely * 3)[:3])
    decode(some, *freely)
    assert outcome_of(some, "wrong").agreement == agreement


def test_the_gap_is_a_mean_over_the_full_answers_tokens_the_first_included() -> None:
    some = trial(reference=full(), logits=LOGITS.flip(0))
    decode(some, 2, 3, END, chances=-1.5)
    decode(some, END)
    found = outcome_of(some, "wrong")
    first = 3.0  # log p of the token that had the highest logit there and the lowest here
    assert found.gap == pytest.approx((first + 3 * 1.0) / 4)
    assert not found.right
