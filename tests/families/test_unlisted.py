"""Families without an entry: served where the default is right, and refused where it is not."""

from __future__ import annotations

import pytest

from prefill_worker.engine.unlisted import check_unlisted
from prefill_worker.preprocess.families import DEFAULT, FAMILIES
from shared.model.support import UnsupportedModelError
from tests.families.family import Family
from tests.families.prefilling import Prefilling


def test_every_family_has_an_entry(family: Family) -> None:
    assert FAMILIES[family.name].mrope == family.mrope
    assert FAMILIES[family.name].tiles == family.tiles


def test_what_the_default_is_wrong_for_is_refused(
    family: Family, prefilling: Prefilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(FAMILIES, family.name)
    trial = (prefilling.model, prefilling.loaded.processor, prefilling.spec)
    if family.mrope:
        with pytest.raises(UnsupportedModelError, match=f"{family.name} has no entry"):
            check_unlisted(*trial)
    elif not family.tiles:
        check_unlisted(*trial)


def test_wrong_features_are_refused(family: Family, prefilling: Prefilling, monkeypatch: pytest.MonkeyPatch) -> None:
    if FAMILIES[family.name] != DEFAULT:
        pytest.skip("not behind the default")
    monkeypatch.delitem(FAMILIES, family.name)
    encode = type(prefilling.model).get_image_features

    def negative(model: object, *args: object, **options: object) -> object:
        made = encode(model, *args, **options)
        made.pooler_output = [-view for view in made.pooler_output]
        return made

    # ours alone: the model's own pass asks its inner model
    monkeypatch.setattr(type(prefilling.model), "get_image_features", negative)
    with pytest.raises(UnsupportedModelError, match="% off"):
        check_unlisted(prefilling.model, prefilling.loaded.processor, prefilling.spec)


def test_a_family_with_an_entry_is_not_tried(prefilling: Prefilling) -> None:
    check_unlisted(None, None, prefilling.spec)  # type: ignore[arg-type]
