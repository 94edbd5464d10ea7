"""A tiny LLaVA checkpoint, made once, and a place for sockets."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.shared.tiny_llava import save_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only by agreement: copy it to change it."""
    directory = tmp_path_factory.mktemp("tiny") / "tiny-llava"
    save_checkpoint(directory)
    return directory


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    """Short, as the path of a socket must be, and private."""
    with tempfile.TemporaryDirectory(prefix="vlcache-") as directory:
        yield Path(directory)
