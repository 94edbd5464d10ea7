"""Rows that travel in waves find back to their places, whatever the waves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shared.kv.eviction import HeavyHitters
from shared.kv.layout import KVLayout
from shared.kv.manifest import Manifest
from shared.kv.waves import LAST_WAVE, travelling_bound, travelling_bytes
from shared.model.wave_order import in_body_order, last_wave
from tests.unit.decode_worker.parcels import manifest_of

layouts = st.builds(
    KVLayout,
    num_layers=st.integers(1, 4),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from((1, 3, 8)),
    dtype=st.sampled_from(("float32", "bfloat16")),
)
numbers = st.one_of(st.integers(0, 3), st.just(LAST_WAVE), st.integers(0, LAST_WAVE))


@st.composite
def parcels(draw: st.DrawFn) -> tuple[Manifest, bytes, bytes]:
    """A manifest, its body, scores included in some, and the wave of each row."""
    layout = draw(layouts)
    heads = layout.num_layers * layout.num_kv_heads
    kept = draw(st.lists(st.integers(1, 6), min_size=heads, max_size=heads))
    scored = draw(st.booleans())
    nbytes = layout.body_bytes(kept) + (4 * sum(kept) if scored else 0)
    body = draw(st.randoms(use_true_random=False)).randbytes(nbytes)
    waves = bytes(draw(st.lists(numbers, min_size=sum(kept), max_size=sum(kept))))
    eviction = HeavyHitters(budget=8, recent=2) if scored else None
    return manifest_of(layout, kept, bytearray(body), eviction=eviction), body, waves


def on_its_way(manifest: Manifest, body: bytes, waves: bytes, *, only: int | None = None) -> bytes:
    """By the words of the module, row by row; `only` the rows of one wave."""
    layout, rows = manifest.layout, list[tuple[int, bytes]]()
    first_row = 0
    for section in layout.sections(manifest.num_kept):
        for offset in (section.key_offset, section.value_offset):
            for row in range(sum(section.rows)):
                at = offset + row * layout.row_bytes
                rows.append((waves[first_row + row], body[at : at + layout.row_bytes]))
        first_row += sum(section.rows)
    wanted = range(LAST_WAVE + 1) if only is None else (only,)
    return b"".join(data for wave in wanted for number, data in rows if number == wave)


@given(parcels())
def test_a_body_is_put_together_again(parcel: tuple[Manifest, bytes, bytes]) -> None:
    manifest, body, waves = parcel
    travelled = on_its_way(manifest, body, waves) + body[manifest.kv_bytes :] + waves
    assert len(travelled) == travelling_bytes(manifest)
    assert bytes(in_body_order(manifest, memoryview(travelled))) == body


@given(parcels())
def test_what_did_not_leave_early_is_found(parcel: tuple[Manifest, bytes, bytes]) -> None:
    manifest, body, waves = parcel
    rest = last_wave(memoryview(body), manifest.layout, manifest.num_kept, waves)
    assert bytes(rest) == on_its_way(manifest, body, waves, only=LAST_WAVE)


@given(parcels())
def test_a_reservation_bounds_what_travels(parcel: tuple[Manifest, bytes, bytes]) -> None:
    manifest, _, _ = parcel
    assert travelling_bytes(manifest) <= travelling_bound(manifest.kv_bytes, manifest.layout)
    if manifest.eviction is not None:
        assert travelling_bytes(manifest) == travelling_bound(manifest.kv_bytes, manifest.layout)


@given(parcels(), st.data())
def test_wrong_waves_name_no_row_twice(parcel: tuple[Manifest, bytes, bytes], data: st.DataObject) -> None:
    """So all that a lie can do is to swap rows, which changes the digest."""
    manifest, body, waves = parcel
    lie = data.draw(st.binary(min_size=len(waves), max_size=len(waves)))
    travelled = on_its_way(manifest, body, waves) + body[manifest.kv_bytes :] + lie
    found, size = bytes(in_body_order(manifest, memoryview(travelled))), manifest.layout.row_bytes
    cuts = range(0, manifest.kv_bytes, size)
    assert sorted(found[at : at + size] for at in cuts) == sorted(body[at : at + size] for at in cuts)
    assert found[manifest.kv_bytes :] == body[manifest.kv_bytes :]


def test_a_byte_per_kept_token_is_a_512th_of_the_kv() -> None:
    layout = KVLayout(num_layers=2, num_kv_heads=2, head_dim=128, dtype="bfloat16")
    manifest = manifest_of(layout, [100] * 4, bytearray(layout.body_bytes([100] * 4)))
    assert (travelling_bytes(manifest) - manifest.body_bytes) * 512 == manifest.body_bytes
