"""What the loading of processors refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import BertConfig

from shared.model.processor import load_processor
from tests.families import gemma3


def test_a_model_without_a_processor_is_refused(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no processor for bert"):
        load_processor(tmp_path)


def test_images_cut_by_pan_and_scan_are_refused(tmp_path: Path) -> None:
    gemma3.FAMILY.save(tmp_path)
    file = tmp_path / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"]["do_pan_and_scan"] = True
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="do_pan_and_scan off"):
        load_processor(tmp_path)
