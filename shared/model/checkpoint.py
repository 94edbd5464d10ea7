"""A checkpoint as a worker of this process sees it: found and understood, its weights not yet read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from shared.config import WorkerConfig
from shared.model.hub import resolve_checkpoint
from shared.model.identity import ModelIdentity
from shared.model.loading import load_spec, pick_dtype
from shared.model.spec import VLMSpec
from shared.model.support import UnsupportedModelError


@contextlib.contextmanager
def refused_in_a_sentence(model: str) -> Iterator[None]:
    """Where a worker starts: a model that it cannot serve ends the process, with the reason and no traceback."""
    try:
        yield
    except (FileNotFoundError, UnsupportedModelError) as error:
        raise SystemExit(f"cannot serve {model!r}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What every role needs to know before it loads its part of the weights."""

    path: Path
    device: torch.device
    dtype: torch.dtype
    spec: VLMSpec
    identity: ModelIdentity


def open_checkpoint(config: WorkerConfig) -> Checkpoint:
    """Finds what `config` names and sets the number of torch's threads.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        UnsupportedModelError: Its architecture cannot be served, its weights are pickled, or it has fewer tokens of
            context than it was asked for.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    path = resolve_checkpoint(config.model, config.revision)
    dtype = pick_dtype(config.dtype, device)
    spec = _shortened(load_spec(path, dtype), config.max_model_len)
    identity = ModelIdentity.of(config.served_model_name, path, spec)
    return Checkpoint(path=path, device=device, dtype=dtype, spec=spec, identity=identity)


def _shortened(spec: VLMSpec, max_model_len: int | None) -> VLMSpec:
    """The same with a context of `max_model_len` tokens; None leaves the model's own."""
    if max_model_len is None:
        return spec
    if max_model_len > spec.context_tokens:
        raise UnsupportedModelError(
            f"--max-model-len {max_model_len} is more than the {spec.context_tokens} tokens of the model"
        )
    return replace(spec, context_tokens=max_model_len)
