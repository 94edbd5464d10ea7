"""A tiny LLaVA checkpoint, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.shared.tiny_llava import save_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only by agreement: copy it to change it."""
    directory = tmp_path_factory.mktemp("tiny") / "tiny-llava"
    save_checkpoint(directory)
    return directory
