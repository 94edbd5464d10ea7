"""The bundled checkpoint, loaded once."""

from typing import Any

import pytest
from transformers import AutoProcessor

from models.shapes_vlm.evaluate import Answerer
from models.shapes_vlm.paths import CHECKPOINT


@pytest.fixture(scope="session")
def processor() -> Any:
    return AutoProcessor.from_pretrained(CHECKPOINT, backend="pil")


@pytest.fixture(scope="session")
def answerer() -> Answerer:
    return Answerer(CHECKPOINT)
