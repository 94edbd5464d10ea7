"""The bundled checkpoint, loaded once."""

from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from models.shapes_vlm.evaluate import Answerer
from models.shapes_vlm.paths import CHECKPOINT


@pytest.fixture(scope="session")
def processor() -> Any:
    return AutoProcessor.from_pretrained(CHECKPOINT, backend="pil")


@pytest.fixture(scope="session")
def answerer() -> Answerer:
    # With one thread, other work on the machine costs its share and not a multiple of it.
    torch.set_num_threads(1)
    return Answerer(CHECKPOINT)
