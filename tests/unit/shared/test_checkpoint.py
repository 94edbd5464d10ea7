"""A checkpoint is found, understood and named before any weight is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared.config import WorkerConfig
from shared.model import checkpoint
from shared.model.checkpoint import open_checkpoint
from shared.model.loading import load_spec
from shared.model.support import UnsupportedModelError


def test_what_a_worker_knows_of_its_checkpoint(tiny_checkpoint: Path) -> None:
    opened = open_checkpoint(WorkerConfig(model=str(tiny_checkpoint), served_model_name="toy", dtype="float16"))
    assert (opened.path, opened.device, opened.dtype) == (tiny_checkpoint, torch.device("cpu"), torch.float16)
    assert opened.spec == load_spec(tiny_checkpoint, torch.float16)
    assert (opened.identity.name, opened.identity.layout) == ("toy", opened.spec.layout)


def test_a_shorter_context_is_the_models_everywhere(tiny_checkpoint: Path) -> None:
    own = open_checkpoint(WorkerConfig(model=str(tiny_checkpoint)))
    assert own.spec.context_tokens > 100
    shorter = open_checkpoint(WorkerConfig(model=str(tiny_checkpoint), max_model_len=100))
    assert (shorter.spec.context_tokens, shorter.identity.to_proto().context_tokens) == (100, 100)
    assert shorter.identity.compatibility == own.identity.compatibility
    all_of_it = own.spec.context_tokens
    assert open_checkpoint(WorkerConfig(model=str(tiny_checkpoint), max_model_len=all_of_it)).spec == own.spec
    with pytest.raises(UnsupportedModelError, match=rf"--max-model-len {all_of_it + 1} .* {all_of_it} tokens"):
        open_checkpoint(WorkerConfig(model=str(tiny_checkpoint), max_model_len=all_of_it + 1))


def test_threads_are_left_alone_unless_a_number_is_named(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[int] = []
    monkeypatch.setattr(checkpoint.torch, "set_num_threads", numbers.append)
    open_checkpoint(WorkerConfig(model=str(tiny_checkpoint)))
    assert numbers == []
    open_checkpoint(WorkerConfig(model=str(tiny_checkpoint), threads=3))
    assert numbers == [3]
