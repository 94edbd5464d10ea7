"""One tiny checkpoint for all tests of a directory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from prefill_worker.engine.engine import PrefillEngine
from prefill_worker.prompt import PromptBuilder
from shared.model.loading import load_prefill_model, load_spec
from shared.model.processor import load_processor
from tests.unit.decode_worker.tiny import load_whole, save_checkpoint


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def engine(checkpoint: Path) -> PrefillEngine:
    return PrefillEngine(load_prefill_model(checkpoint, dtype=torch.float32, device=torch.device("cpu")))


@pytest.fixture(scope="session")
def whole(checkpoint: Path) -> Any:
    """The same weights as transformers alone runs them."""
    return load_whole(checkpoint)


@pytest.fixture(scope="session")
def builder(checkpoint: Path) -> PromptBuilder:
    return PromptBuilder(load_processor(checkpoint), load_spec(checkpoint, torch.float32), max_images=3)
