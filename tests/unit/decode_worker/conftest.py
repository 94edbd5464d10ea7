"""One tiny checkpoint for all tests of a directory."""

from pathlib import Path

import pytest
import torch

from tests.unit.decode_worker.tiny import save_checkpoint


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))
