"""A checkpoint is found, understood and named before any weight is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared.config import WorkerConfig
from shared.model import checkpoint
from shared.model.checkpoint import open_checkpoint
from shared.model.loading import load_spec


def test_what_a_worker_knows_of_its_checkpoint(tiny_checkpoint: Path) -> None:
    opened = open_checkpoint(WorkerConfig(model=str(tiny_checkpoint), model_name="toy", dtype="fp16"))
    assert (opened.path, opened.device, opened.dtype) == (tiny_checkpoint, torch.device("cpu"), torch.float16)
    assert opened.spec == load_spec(tiny_checkpoint, torch.float16)
    assert (opened.identity.name, opened.identity.layout) == ("toy", opened.spec.layout)


def test_threads_are_left_alone_unless_a_number_is_named(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[int] = []
    monkeypatch.setattr(checkpoint.torch, "set_num_threads", numbers.append)
    open_checkpoint(WorkerConfig(model=str(tiny_checkpoint)))
    assert numbers == []
    open_checkpoint(WorkerConfig(model=str(tiny_checkpoint), threads=3))
    assert numbers == [3]
