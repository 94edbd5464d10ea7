"""Settings of a prefill worker that nothing else tests."""

from __future__ import annotations

from typing import Any

import pytest

from prefill_worker.config import PrefillConfig


@pytest.mark.parametrize(
    "wrong",
    [
        {"retained_mib": -1},
        {"parcel_lease_s": 0.0},
        {"parcel_lease_s": -1.0},
        {"parcel_lease_s": float("nan")},
        {"max_video_frames": 0},
        {"max_video_tokens": 511},
    ],
)
def test_a_bad_setting_is_refused_by_its_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PrefillConfig(model="m", **wrong)


def test_a_request_that_names_no_length_finds_room_in_the_context() -> None:
    assert PrefillConfig(model="m", max_model_len=257).max_model_len == 257
    with pytest.raises(ValueError, match="default_max_new_tokens must leave room"):
        PrefillConfig(model="m", max_model_len=256)


def test_nothing_leaves_early_where_nothing_is_certain() -> None:
    assert PrefillConfig(model="m", cascade=True, early_shipping=True).early_shipping
    with pytest.raises(ValueError, match="early_shipping needs cascade"):
        PrefillConfig(model="m", early_shipping=True)


@pytest.mark.parametrize(("settings", "retained_mib"), [({}, 20), ({"retained_mib": 0}, 0), ({"retained_mib": 50}, 50)])
def test_half_of_the_arena_is_for_retained_parcels_unless_told_otherwise(
    settings: dict[str, int], retained_mib: int
) -> None:
    assert PrefillConfig(model="m", arena_mib=40, **settings).retained_bytes == retained_mib << 20
