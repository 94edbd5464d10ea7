"""One tiny checkpoint for all tests of a directory."""

from pathlib import Path

import pytest
import torch

from decode_worker.config import DecodeConfig
from decode_worker.worker import LoadedModel, load_model
from tests.unit.decode_worker.sequences import prefill, text_ids
from tests.unit.decode_worker.shipment import Shipment
from tests.unit.decode_worker.tiny import load_whole, save_checkpoint


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def loaded(checkpoint: Path) -> LoadedModel:
    return load_model(DecodeConfig(model=str(checkpoint), model_name="tiny", dtype="fp32"))


@pytest.fixture(scope="session")
def shipment(checkpoint: Path, loaded: LoadedModel) -> Shipment:
    return Shipment(prefill(load_whole(checkpoint), text_ids(0, 40)), loaded)
