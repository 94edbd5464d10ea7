"""Manifests come back as they were sent, and whatever else arrives is refused, never believed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from vlcache.worker.v1 import kv_pb2 as pb

from shared.errors import DataLossError, FailedPreconditionError, InvalidRequestError
from shared.kv.eviction import FixedSlot, HeavyHitters, Recall, SharedLayers
from shared.kv.layout import KVLayout
from shared.kv.manifest import MAX_LOGICAL_LENGTH, MAX_TABLE_ROWS, Manifest, TransferId, body_digest, score_bytes
from shared.request.sampling import Sampling
from tests.properties.encodings import saving
from tests.properties.evictions import evictions
from tests.properties.layouts import ragged

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
shares = st.floats(0, 1)
samplings = st.builds(
    Sampling,
    max_new_tokens=st.integers(1, 2**31 - 1),
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, 2**31 - 1),
    seed=st.integers(0, 2**64 - 1),
    stop=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9), max_size=4).map(tuple),
    ignore_eos=st.booleans(),
    presence_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.1, 10),
    logprobs=st.one_of(st.none(), st.integers(0, 20)),
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    layout, num_kept = draw(ragged(largest=40))
    heads = layout.num_kv_heads
    upper = st.sets(st.integers(1, layout.num_layers - 1)) if layout.num_layers > 1 else st.just(set())
    empty = draw(st.one_of(st.just(set()), upper))
    num_kept = tuple(0 if place // heads in empty else kept for place, kept in enumerate(num_kept))
    own = [kept for kept in num_kept if kept]
    eviction = draw(evictions(layout, num_kept))
    encoding = draw(saving(layout, num_kept))
    kv_bytes = encoding.body_bytes(layout, num_kept) if encoding else layout.body_bytes(num_kept)
    explained = draw(st.booleans())
    logical_length = draw(st.integers(max(num_kept), max(num_kept) + 20 if explained else MAX_LOGICAL_LENGTH))
    chance = draw(st.randoms(use_true_random=False))
    places = [chance.sample(range(logical_length), kept) for kept in num_kept] if explained else []
    return Manifest(
        transfer=TransferId(request_id=draw(text), attempt=draw(st.integers(0, 2**32 - 1)), prefill_epoch=draw(text)),
        model=draw(text),
        compatibility=draw(text),
        layout=layout,
        num_kept=num_kept,
        logical_length=logical_length,
        next_position=draw(st.integers(1, 2 * MAX_LOGICAL_LENGTH)),
        policy=draw(text),
        requested_retention=draw(shares),
        realised_retention=draw(shares),
        layer_attention_mass=tuple(draw(st.floats(0, 1, width=32)) for _ in range(layout.num_layers)),
        body_bytes=kv_bytes + score_bytes(eviction, num_kept),
        digest=draw(st.binary(max_size=16)),
        generated=tuple(draw(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=min(own) + 1))),
        sampling=draw(samplings),
        prompt_token_ids=tuple(draw(st.lists(st.integers(0, 2**32 - 1), max_size=5))),
        encoding=encoding,
        eviction=eviction,
        kept_tokens=tuple(bitmap(kept, logical_length) for kept in places),
    )


def bitmap(kept: Iterable[int], num_tokens: int) -> bytes:
    return sum(1 << place for place in kept).to_bytes(-(-num_tokens // 8), "little")


@given(manifests())
def test_a_manifest_round_trips_over_the_wire(manifest: Manifest) -> None:
    wire = manifest.to_proto().SerializeToString()
    assert Manifest.from_proto(pb.KVManifest.FromString(wire)) == manifest


EXAMPLE = pb.KVManifest(
    format_version=1,
    transfer=pb.TransferId(request_id="r", attempt=1, prefill_epoch="e"),
    layout=KVLayout(num_layers=2, num_kv_heads=2, head_dim=4, dtype="float32").to_proto(),
    num_kept=[3, 1, 2, 2],
    logical_length=5,
    next_position=5,
    generated=[7],
    body_bytes=2 * 8 * 4 * 4,
    sampling=Sampling(max_new_tokens=1).to_proto(),
)


def changed(**fields: Any) -> pb.KVManifest:
    """The example with some fields replaced; None clears one."""
    message = pb.KVManifest()
    message.CopyFrom(EXAMPLE)
    for name, value in fields.items():
        message.ClearField(name)
        if isinstance(value, list):
            getattr(message, name).extend(value)
        elif value is not None:
            target = getattr(message, name)
            if hasattr(target, "CopyFrom"):
                target.CopyFrom(value)
            else:
                setattr(message, name, value)
    return message


def test_the_example_is_valid() -> None:
    assert Manifest.from_proto(changed()).num_kept == (3, 1, 2, 2)


HALF = pb.Eviction.Share(numerator=1, denominator=2)


def slot(**numbers: Any) -> pb.Eviction:
    return pb.Eviction(fixed_slot=pb.Eviction.FixedSlot(**({"retention": [HALF, HALF], "distance": -25} | numbers)))


def hitters(budget: int, recent: int) -> pb.Eviction:
    return pb.Eviction(heavy_hitters=pb.Eviction.HeavyHitters(budget=budget, recent=recent))


def recall(**numbers: Any) -> pb.Eviction:
    values = {"budget": [4, 5], "recent": [1, 2], "sinks": 2} | numbers
    return pb.Eviction(recall=pb.Eviction.Recall(**values))


def scope(**numbers: Any) -> pb.Eviction:
    values = {"variant": "slide", "window": 8, "recent": 2, "delta": 3} | numbers
    return pb.Eviction(scope=pb.Eviction.Scope(**values))


def guard(**numbers: Any) -> pb.Eviction:
    values = {"retention": [HALF, HALF], "sinks": 4, "text": [1, 2]} | numbers
    return pb.Eviction(text_guard=pb.Eviction.TextGuard(**values))


def shared(**numbers: Any) -> pb.Eviction:
    return pb.Eviction(shared_layers=pb.Eviction.SharedLayers(**({"borrowers": [1], "lenders": [0]} | numbers)))


def sparse(**numbers: Any) -> pb.Eviction:
    return pb.Eviction(sparse_read=pb.Eviction.SparseRead(**({"select_layers": [0, 1], "top": 4} | numbers)))


# two rows in every layer and head, so that every kind is possible
EVEN: dict[str, Any] = {"num_kept": [2, 2, 2, 2]}
WITH_SCORES: dict[str, Any] = {"body_bytes": 2 * 8 * 16 + 8 * 4, "score_bytes": 8 * 4}


@pytest.mark.parametrize("eviction", [slot(), scope(), guard(), sparse()])
def test_every_kind_suits_an_even_parcel(eviction: pb.Eviction) -> None:
    assert Manifest.from_proto(changed(eviction=eviction, **EVEN)).score_bytes == 0


def test_scores_are_a_part_of_the_body() -> None:
    manifest = Manifest.from_proto(changed(eviction=hitters(3, 1), **WITH_SCORES))
    assert manifest.eviction == HeavyHitters(budget=3, recent=1)
    assert manifest.body_bytes == manifest.layout.body_bytes(manifest.num_kept) + manifest.score_bytes


def test_budgets_of_layers_travel() -> None:
    manifest = Manifest.from_proto(changed(eviction=recall(), **EVEN, **WITH_SCORES))
    assert manifest.eviction == Recall(budget=(4, 5), recent=(1, 2), sinks=2)


def test_an_exact_share_stays_exact() -> None:
    share = pb.Eviction.Share(numerator=29, denominator=100)
    manifest = Manifest.from_proto(changed(eviction=slot(retention=[share, HALF])))
    assert manifest.eviction == FixedSlot(retention=(Fraction(29, 100), Fraction(1, 2)), distance=-25)


def test_a_table_that_no_worker_could_hold_is_an_invalid_request() -> None:
    """One head with many rows makes room for as many in all others."""
    most = MAX_TABLE_ROWS // 1024
    wide = KVLayout(num_layers=32, num_kv_heads=32, head_dim=4, dtype="float32")
    for kept, fits in ((most, True), (most + 1, False)):
        num_kept = [kept] + [1] * 1023
        message = changed(
            layout=wide.to_proto(),
            num_kept=num_kept,
            logical_length=kept,
            body_bytes=wide.body_bytes(num_kept),
            eviction=scope(),
        )
        if fits:
            assert Manifest.from_proto(message).eviction is not None
        else:
            with pytest.raises(InvalidRequestError, match="too many rows"):
                Manifest.from_proto(message)


ONE_LAYER: dict[str, Any] = {"num_kept": [3, 1, 0, 0], "body_bytes": 2 * 4 * 16}


def test_a_layer_that_borrows_keeps_nothing() -> None:
    manifest = Manifest.from_proto(changed(eviction=shared(), **ONE_LAYER, kept_tokens=[*KEPT[:2], b"\0", b"\0"]))
    assert manifest.eviction == SharedLayers(borrowers=(1,), lenders=(0,))
    with pytest.raises(InvalidRequestError, match="as many rows"):
        Manifest.from_proto(changed(eviction=shared(), **ONE_LAYER, generated=[7, 8, 9]))


def test_another_lender_breaks_the_digest() -> None:
    body = memoryview(bytes(8))
    layout = KVLayout(num_layers=3, num_kv_heads=1, head_dim=1, dtype="float32").to_proto()
    rows = {"layout": layout, "num_kept": [1, 1, 0], "body_bytes": 2 * 2 * 4}
    manifest = Manifest.from_proto(changed(eviction=shared(borrowers=[2], lenders=[0]), **rows))
    for lender in (0, 1):
        told = changed(eviction=shared(borrowers=[2], lenders=[lender]), digest=manifest.digest_of(body), **rows)
        if lender == 0:
            Manifest.from_proto(told).check_digest(body)
        else:
            with pytest.raises(DataLossError):
                Manifest.from_proto(told).check_digest(body)


BAD_SHARING = {
    "nobody says so": None,
    "nobody borrows": shared(borrowers=[], lenders=[]),
    "a lender is missing": shared(lenders=[]),
    "a lender too many": shared(lenders=[0, 0]),
    "another one borrows": shared(borrowers=[0], lenders=[0]),
    "from itself": shared(lenders=[1]),
    "from above": shared(borrowers=[0, 1], lenders=[1, 0]),
    "from nowhere": shared(lenders=[2**32 - 1]),
    "a layer that is not there": shared(borrowers=[1, 2], lenders=[0, 0]),
    "twice": shared(borrowers=[1, 1], lenders=[0, 0]),
}


@pytest.mark.parametrize("eviction", BAD_SHARING.values(), ids=BAD_SHARING.keys())
def test_a_layer_without_rows_needs_a_lender(eviction: pb.Eviction | None) -> None:
    with pytest.raises(InvalidRequestError):
        Manifest.from_proto(changed(eviction=eviction, **ONE_LAYER))


@pytest.mark.parametrize("num_kept", [[3, 1, 0, 4], [3, 1, 2, 2], [8, 0, 0, 0], [0, 0, 4, 4], [0, 0, 0, 0]])
def test_rows_and_lenders_agree(num_kept: list[int]) -> None:
    body_bytes = 2 * sum(num_kept) * 16
    with pytest.raises(InvalidRequestError):
        Manifest.from_proto(changed(eviction=shared(), num_kept=num_kept, logical_length=8, body_bytes=body_bytes))


def test_a_chain_of_lenders_is_refused() -> None:
    layout = KVLayout(num_layers=3, num_kv_heads=1, head_dim=4, dtype="float32").to_proto()
    rows = {"num_kept": [4, 0, 0], "body_bytes": 2 * 4 * 16}
    for lenders, chain in (([0, 0], False), ([0, 1], True)):
        message = changed(layout=layout, eviction=shared(borrowers=[1, 2], lenders=lenders), **rows)
        if chain:
            with pytest.raises(InvalidRequestError, match="cannot lend"):
                Manifest.from_proto(message)
        else:
            assert Manifest.from_proto(message).eviction is not None


BAD_EVICTIONS = {
    "a share of nothing": slot(retention=[HALF, pb.Eviction.Share(numerator=1)]),
    "a share above one": slot(retention=[HALF, pb.Eviction.Share(numerator=3, denominator=2)]),
    "a share is missing": slot(retention=[HALF]),
    "a slot behind the prompt": slot(distance=0),
    "a slot far before it": slot(distance=-(1 << 25)),
    "more recent rows than budget": hitters(3, 4),
    "more kept rows than budget": hitters(2, 1),
    "an enormous budget": hitters(1 << 25, 1),
    "layers without a budget": recall(budget=[4]),
    "layers without recent rows": recall(recent=[1]),
    "no row that may go": recall(recent=[2, 2]),
    "more kept rows than a layer's budget": recall(budget=[1, 5], recent=[0, 0], sinks=0),
    "heads of a layer that differ": recall(),
    "an unknown variant": scope(variant="slid"),
    "no window": scope(window=0, recent=0),
    "more recent rows than window": scope(recent=9),
    "never selected again": scope(delta=0),
    "too few text counts": guard(text=[1]),
    "heads that differ": guard(),
    "no layer selects": sparse(select_layers=[]),
    "layers in disorder": sparse(select_layers=[1, 0]),
    "more layers than there are": sparse(select_layers=[0, 1, 2]),
    "nothing is read": sparse(top=0),
    "layers that differ": sparse(),
}


@pytest.mark.parametrize("eviction", BAD_EVICTIONS.values(), ids=BAD_EVICTIONS.keys())
@pytest.mark.parametrize("even", [False, True])
def test_an_eviction_that_makes_no_sense_is_an_invalid_request(eviction: pb.Eviction, even: bool) -> None:
    if even and eviction in (guard(), sparse(), hitters(2, 1), recall()):
        pytest.skip("right for these rows")
    more = WITH_SCORES if eviction.WhichOneof("kind") in ("heavy_hitters", "recall") else {}
    with pytest.raises(InvalidRequestError):
        Manifest.from_proto(changed(eviction=eviction, **more, **(EVEN if even else {})))


# per layer 4 rows of 4: K of two heads with scales and zeros, V likewise, a byte of codes a row
CODED = pb.KVEncoding(bits=2, group=8, key_channels=4)
CODED_BYTES = 2 * (2 * 2 * 4 * 2 + 2 * 4 * 2 + 2 * 4)


def test_an_encoded_body_has_a_size_of_its_own() -> None:
    assert Manifest.from_proto(changed(encoding=CODED, body_bytes=CODED_BYTES)).kv_bytes == CODED_BYTES


# of the example's five tokens
KEPT = [b"\x15", b"\x10", b"\x03", b"\x18"]


def test_kept_tokens_are_told_where_they_are_asked_for() -> None:
    assert Manifest.from_proto(changed(kept_tokens=KEPT)).kept_tokens == tuple(KEPT)
    assert not Manifest.from_proto(changed()).to_proto().kept_tokens


INCONSISTENT = {
    "kept tokens of too few heads": {"kept_tokens": KEPT[:3]},
    "kept tokens of too many heads": {"kept_tokens": [*KEPT, b"\x03"]},
    "another number of kept tokens": {"kept_tokens": [*KEPT[:3], b"\x08"]},
    "a kept token behind the last": {"kept_tokens": [*KEPT[:3], b"\x28"]},
    "a bitmap too short": {"kept_tokens": [*KEPT[:3], b""]},
    "an enormous bitmap": {"kept_tokens": [*KEPT[:3], b"\x18" + bytes(1 << 20)]},
    "scores that nobody needs": WITH_SCORES,
    "scores that the eviction does not need": WITH_SCORES | {"eviction": slot()},
    "scores that are missing": {"eviction": hitters(3, 1)},
    "scores that are announced only": {"eviction": hitters(3, 1), "score_bytes": 32},
    "scores that are not announced": {"eviction": hitters(3, 1), "body_bytes": 2 * 8 * 16 + 32},
    "one score too few": {"eviction": hitters(3, 1), "body_bytes": 2 * 8 * 16 + 28, "score_bytes": 28},
    "too few counts": {"num_kept": [3, 1, 2], "body_bytes": 2 * 6 * 16},
    "too many counts": {"num_kept": [3, 1, 2, 1, 1]},
    "no counts": {"num_kept": None, "body_bytes": 0},
    "an empty head": {"num_kept": [4, 0, 2, 2]},
    "more kept than there were": {"num_kept": [6, 1, 1, 0]},
    "one more than there were": {"num_kept": [6, 1, 1, 1], "body_bytes": 2 * 9 * 16},
    "body too small": {"body_bytes": 2 * 8 * 16 - 1},
    "body too large": {"body_bytes": 2 * 8 * 16 + 1},
    "an enormous body": {"body_bytes": 2**64 - 1},
    "no length": {"logical_length": 0},
    "an enormous length": {"logical_length": MAX_LOGICAL_LENGTH + 1},
    "no next position": {"next_position": 0},
    "a negative position": {"next_position": -1},
    "an enormous position": {"next_position": 2 * MAX_LOGICAL_LENGTH + 1},
    "no sampling": {"sampling": None},
    "a retention that is no number": {"realised_retention": math.nan},
    "a retention above one": {"requested_retention": 1.5},
    "a negative retention": {"realised_retention": -0.1},
    "an attention mass that is no number": {"layer_attention_mass": [0.5, math.nan]},
    "an infinite attention mass": {"layer_attention_mass": [0.5, math.inf]},
    "an attention mass too many": {"layer_attention_mass": [0.5] * 3},
    "an encoding of nothing": {"encoding": pb.KVEncoding()},
    "an encoding that saves nothing": {"encoding": pb.KVEncoding(group=32, residual=32, key_channels=4)},
    "an encoded body as large as a plain one": {"encoding": pb.KVEncoding(bits=8, group=8, key_channels=4)},
    "an encoded body too small": {"encoding": CODED, "body_bytes": CODED_BYTES - 1},
    "an encoded body too large": {"encoding": CODED, "body_bytes": CODED_BYTES + 1},
    "an encoding of 3 bits": {"encoding": pb.KVEncoding(bits=3, group=8, key_channels=4)},
    "a group of nothing": {"encoding": pb.KVEncoding(bits=2, key_channels=4)},
    "an enormous group": {"encoding": pb.KVEncoding(bits=2, group=2**32 - 1, key_channels=4)},
    "no K channel": {"encoding": pb.KVEncoding(bits=2, group=8)},
    "more K channels than there are": {"encoding": pb.KVEncoding(bits=2, group=8, key_channels=5)},
    "an enormous number of K channels": {"encoding": pb.KVEncoding(bits=2, group=8, key_channels=2**32 - 1)},
}


@pytest.mark.parametrize("fields", INCONSISTENT.values(), ids=INCONSISTENT.keys())
def test_parts_that_disagree_are_an_invalid_request(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        Manifest.from_proto(changed(**fields))


FOREIGN = {
    "no version": {"format_version": 0},
    "a later version": {"format_version": 2},
    "an unknown kind of eviction": {"eviction": pb.Eviction()},
    "no layout": {"layout": None},
    "an impossible layout": {"layout": pb.KVManifest().layout.__class__(num_layers=2, dtype="float32")},
}


@pytest.mark.parametrize("fields", FOREIGN.values(), ids=FOREIGN.keys())
def test_another_format_is_a_failed_precondition(fields: dict[str, Any]) -> None:
    with pytest.raises(FailedPreconditionError):
        Manifest.from_proto(changed(**fields))


def read(wire: bytes) -> None:
    """Reads like a receiver does; only refusals may be raised."""
    try:
        Manifest.from_proto(pb.KVManifest.FromString(wire))
    except (DecodeError, InvalidRequestError, FailedPreconditionError):
        return


@given(st.binary(max_size=200))
def test_garbage_is_refused(wire: bytes) -> None:
    read(wire)


@given(st.data())
def test_a_damaged_manifest_is_refused_or_consistent(data: st.DataObject) -> None:
    wire = bytearray(EXAMPLE.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    read(bytes(wire[: data.draw(st.integers(0, len(wire)))]))


def test_every_truncation_is_refused_or_consistent() -> None:
    wire = EXAMPLE.SerializeToString()
    for length in range(len(wire)):
        read(wire[:length])


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**32 - 1), max_size=8), st.integers(0, 2**32 - 1))
def test_sizes_are_believed_only_when_they_add_up(body_bytes: int, num_kept: list[int], length: int) -> None:
    message = changed(body_bytes=body_bytes, num_kept=num_kept, logical_length=length)
    try:
        manifest = Manifest.from_proto(message)
    except InvalidRequestError:
        return
    assert manifest.body_bytes == manifest.layout.body_bytes(manifest.num_kept) == 2 * sum(num_kept) * 16
    assert max(num_kept) <= length


def test_a_parcel_of_another_model_is_refused() -> None:
    manifest = Manifest.from_proto(changed(compatibility="abc"))
    manifest.check_compatible(compatibility="abc", layout=manifest.layout)
    other = KVLayout(num_layers=2, num_kv_heads=2, head_dim=4, dtype="bfloat16")
    for compatibility, layout in (("abd", manifest.layout), ("", manifest.layout), ("abc", other)):
        with pytest.raises(FailedPreconditionError) as caught:
            manifest.check_compatible(compatibility=compatibility, layout=layout)
        assert caught.value.reason == "INCOMPATIBLE_PARCEL"


@given(st.binary(min_size=1, max_size=64), st.data())
def test_any_changed_byte_breaks_the_digest(body: bytes, data: st.DataObject) -> None:
    manifest = Manifest.from_proto(changed(digest=body_digest(memoryview(body))))
    manifest.check_digest(memoryview(body))
    damaged = bytearray(body)
    damaged[data.draw(st.integers(0, len(body) - 1))] ^= data.draw(st.integers(1, 255))
    for other in (damaged, body[:-1], body + b"\0"):
        with pytest.raises(DataLossError):
            manifest.check_digest(memoryview(other))


def test_an_absent_or_short_digest_matches_nothing() -> None:
    for digest in (b"", body_digest(memoryview(b"body"))[:8]):
        with pytest.raises(DataLossError):
            Manifest.from_proto(changed(digest=digest)).check_digest(memoryview(b"body"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_bad_sampling_inside_a_manifest_is_an_invalid_request(value: float) -> None:
    sampling = Sampling(max_new_tokens=1).to_proto()
    sampling.temperature = value
    with pytest.raises(InvalidRequestError):
        Manifest.from_proto(changed(sampling=sampling))
