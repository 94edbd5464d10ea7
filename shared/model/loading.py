"""Loads a Hugging Face checkpoint for either half of the service; `hub.py` says where it lies."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedModel

from shared.kv.layout import KVLayout
from shared.kv.manifest import FORMAT_VERSION
from shared.model.attention import DECODE_ATTENTION, PREFILL_ATTENTION
from shared.model.packing import pack_linears
from shared.model.progress import on_terminal
from shared.model.spec import VLMSpec
from shared.model.support import UnsupportedModelError, model_class
from shared.model.trial import try_out

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Bytes of each weight file that enter the compatibility hash; hashing 14 GB at every start would take a minute.
HASHED_BYTES = 1 << 20
LANGUAGE_PARTS = ("language_model", "text_model")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it fast (a GPU, or AMX on a CPU), else float32."""
    if name != "auto":
        return DTYPES[name]
    fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def load_config(path: Path) -> PretrainedConfig:
    """The configuration of a checkpoint.

    Raises:
        UnsupportedModelError: transformers does not know the architecture, or its code would come with the checkpoint.
    """
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except ValueError as error:
        raise UnsupportedModelError(f"{path.name} has no configuration that transformers knows: {error}") from error


def load_spec(path: Path, dtype: torch.dtype) -> VLMSpec:
    """Reads what the services need to know about a checkpoint."""
    config = load_config(path)
    return VLMSpec.from_config(config, eos_token_ids=_eos_token_ids(path, config), dtype=dtype)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer alone: all that decode needs."""
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def load_prefill_model(path: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The whole model; only its language part uses our attention function."""
    cls = model_class(load_config(path))
    return _load(cls, path, dtype=dtype, device=device, attention=PREFILL_ATTENTION)


def load_decode_model(path: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The language model alone: no vision weight is read, and none of the language model's is missing."""
    cls = _language_only(model_class(load_config(path)))
    model = _load(cls, path, dtype=dtype, device=device, attention=DECODE_ATTENTION)
    pack_linears(model)
    return model


def compatibility_hash(path: Path, layout: KVLayout) -> str:
    """Hex digest of all that two workers must share to exchange KV: architecture, weights, layout, form of parcels."""
    digest = _checkpoint_digest(path)
    digest.update(f"{FORMAT_VERSION} {layout!r}".encode())
    return digest.hexdigest()


def checkpoint_hash(path: Path) -> str:
    """The part of it that is the checkpoint's: architecture and weights, in whatever precision they are loaded."""
    return _checkpoint_digest(path).hexdigest()


def _load(
    cls: type[PreTrainedModel], path: Path, *, dtype: torch.dtype, device: torch.device, attention: str
) -> PreTrainedModel:
    started = time.monotonic()
    log.info("loading %s (%.1f GB) as %s", path.name, _weight_bytes(path) / 1e9, dtype)
    with _quiet():
        model, loading = cls.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation={"text_config": attention},
            output_loading_info=True,
            use_safetensors=True,
        )
    if loading["missing_keys"] or loading["mismatched_keys"]:
        raise UnsupportedModelError(f"weights are missing from {path.name}: {sorted(loading['missing_keys'])[:5]}")
    model = model.to(device).eval()
    log.info("loaded in %.1f s", time.monotonic() - started)
    try_out(model, VLMSpec.from_config(model.config, eos_token_ids=frozenset(), dtype=torch.float32).layout)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Decode leaves the vision weights in the file on purpose; the report of them would be pages long."""
    messages = transformers.utils.logging
    level, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    if not on_terminal():
        messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(level)
        if bars:
            messages.enable_progress_bar()


def _language_only(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass that drops everything but the language model right after construction.

    It carries the module and name of its base: otherwise transformers takes it for custom code, skips the
    conversion of legacy weight names, and leaves the language model randomly initialised with only a log message.
    """

    def __init__(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        base.__init__(self, config, *args, **kwargs)
        for name, _ in list(self.model.named_children()):
            if name not in LANGUAGE_PARTS:
                delattr(self.model, name)

    return type(base.__name__, (base,), {"__init__": __init__, "__module__": base.__module__})


def _eos_token_ids(path: Path, config: PretrainedConfig) -> frozenset[int]:
    """Generation settings win over the model's, as in transformers' `generate`."""
    eos = config.get_text_config().eos_token_id
    if (path / "generation_config.json").exists():
        configured = GenerationConfig.from_pretrained(path).eos_token_id
        eos = configured if configured is not None else eos
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)


def _weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _checkpoint_digest(path: Path) -> hashlib._Hash:
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        digest.update(_ends_of(file))
    return digest


def _ends_of(file: Path) -> bytes:
    with file.open("rb") as stream:
        head = stream.read(HASHED_BYTES)
        stream.seek(max(0, file.stat().st_size - HASHED_BYTES), os.SEEK_SET)
        return head + stream.read(HASHED_BYTES)
