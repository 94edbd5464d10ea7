"""The file that says which layers may share: it is read as it was written, or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from models.shapes_vlm.paths import CHECKPOINT
from prefill_worker.compression.layer_sharing import FILE_NAME, LayerSharing, SharedPair
from shared.model.loading import checkpoint_hash
from tests.unit.decode_worker.tiny import LAYERS
from tests.unit.prefill_worker.sharing import sharing


@pytest.fixture
def written(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint with its file."""
    path = tmp_path / "copy"
    shutil.copytree(checkpoint, path)
    dataclasses.replace(sharing((2, 0)), checkpoint=checkpoint_hash(path)).save(path)
    return path


def test_it_is_read_as_it_was_written(written: Path) -> None:
    found = LayerSharing.load(written, LAYERS)
    assert found is not None
    assert found.pairs == (SharedPair(borrower=2, lender=0, distance=1.0, cosine=0.9),)


def test_nothing_is_known_without_a_file(checkpoint: Path) -> None:
    assert LayerSharing.load(checkpoint, LAYERS) is None


def test_it_is_of_no_use_with_other_weights(written: Path) -> None:
    (weights,) = written.glob("*.safetensors")
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert LayerSharing.load(written, LAYERS) is None


DAMAGES: dict[str, dict[str, Any]] = {
    "another format": {"format": 2},
    "no pairs": {"pairs": []},
    "not a list": {"pairs": 3},
    "an unknown field": {"more": 1},
    "a pair without a lender": {"pairs": [{"borrower": 2}]},
    "a chain": {"pairs": [(1, 0), (2, 1)]},
    "twice": {"pairs": [(2, 0), (2, 1)]},
    "upside down": {"pairs": [(0, 2)]},
    "a negative layer": {"pairs": [(2, -1)]},
    "a layer too many": {"pairs": [(3, 0)]},
    "words": {"pairs": [("a", "b")]},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_not_used(written: Path, damage: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    values = json.loads((written / FILE_NAME).read_text())
    (pair,) = values["pairs"]
    if isinstance(listed := damage.get("pairs"), list) and not any(isinstance(each, dict) for each in listed):
        damage = {"pairs": [pair | {"borrower": high, "lender": low} for high, low in listed]}
    (written / FILE_NAME).write_text(json.dumps(values | damage))
    assert LayerSharing.load(written, LAYERS) is None
    assert FILE_NAME in caplog.text


@pytest.mark.parametrize("text", ["", "[1]", "null", '{"format": 1}', "{"])
def test_something_else_is_not_used(written: Path, text: str) -> None:
    (written / FILE_NAME).write_text(text)
    assert LayerSharing.load(written, LAYERS) is None


def test_the_bundled_model_has_one_for_its_weights() -> None:
    found = LayerSharing.load(CHECKPOINT, 8)
    assert found is not None, "python -m prefill_worker.calibrate makes it anew"
    assert all(pair.cosine > found.threshold for pair in found.pairs)
