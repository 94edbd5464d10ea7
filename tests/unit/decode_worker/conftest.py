"""One tiny checkpoint for all tests of a directory."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from decode_worker.config import DecodeConfig
from decode_worker.worker import LoadedModel, load_model
from tests.unit.decode_worker.hand_driven import HandDriven, hand_driven
from tests.unit.decode_worker.old_and_young import PROMISED, pool_of
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
    return load_model(DecodeConfig(model=str(checkpoint), served_model_name="tiny", dtype="float32"))


@pytest.fixture(scope="session")
def shipment(checkpoint: Path, loaded: LoadedModel) -> Shipment:
    return Shipment(prefill(load_whole(checkpoint), text_ids(0, 40)), loaded)


@pytest.fixture(params=["slabs", "blocks"])
def it(request: pytest.FixtureRequest) -> Iterator[HandDriven]:
    """A worker over either storage with room for the old and the young request, without what they will generate."""
    with hand_driven(pool_of(request.param, tokens=8), promised_tokens=PROMISED) as driven:
        yield driven
