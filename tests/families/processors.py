"""Processors for images alone, also where torchvision is missing.

transformers' video processors exist for torchvision only, and a processor that has one cannot be built without it,
even if no video is ever shown to it.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

VIDEO = "video_processor"


def images_only(base: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A subclass of `base`, under its name, that neither loads, keeps nor saves a video processor."""

    def get_attributes(_cls: type[ProcessorMixin]) -> list[str]:
        return [name for name in base.get_attributes() if name != VIDEO]

    def from_args_and_dict(_cls: type[ProcessorMixin], args: Any, fields: dict[str, Any], **kwargs: Any) -> Any:
        # SmolVLM has no default for it
        return base.from_args_and_dict.__func__(_cls, args, {**fields, VIDEO: None}, **kwargs)

    members = {
        "__module__": base.__module__,
        "get_attributes": classmethod(get_attributes),
        "from_args_and_dict": classmethod(from_args_and_dict),
        # SmolVLM asks it for the defaults of its chat template's arguments
        VIDEO: SimpleNamespace(num_frames=None, fps=None),
    }
    return type(base.__name__, (base,), members)


def load_processor(folder: Path) -> ProcessorMixin:
    """The processor of a checkpoint, always with the PIL backend."""
    base = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(folder))]
    return images_only(base).from_pretrained(folder, backend="pil", local_files_only=True)
