"""Loads the processor of a Hugging Face checkpoint, for images alone. Needs neither torch nor torchvision.

transformers' video processors exist for torchvision only, and a processor that has one cannot be built without it, even
if no video is ever shown to it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

VIDEO = "video_processor"
# How a processor tells what images of given sizes become.
COUNTS = "_get_num_multimodal_tokens"
# transformers 5.17 takes these for torchvision's, because their comments name that, and hides them without it.
for hidden in (Idefics3ImageProcessorPil, SmolVLMImageProcessorPil):
    setattr(importlib.import_module(hidden.__module__.rpartition(".")[0]), hidden.__name__, hidden)


def load_processor(path: Path) -> Any:
    """Tokenizer and image processor. Always the PIL backend: the torchvision one resizes slightly differently.

    Raises:
        ValueError: transformers has none for this kind of model, or it cuts images so that nobody can tell how often.
    """
    config = AutoConfig.from_pretrained(path)
    if type(config) not in PROCESSOR_MAPPING:
        raise ValueError(f"transformers has no processor for {config.model_type}")
    base = PROCESSOR_MAPPING[type(config)]
    processor = images_only(base, _video_size(path)).from_pretrained(path, backend="pil")
    if getattr(processor.image_processor, "do_pan_and_scan", False):
        raise ValueError("images that are cut by pan and scan are not supported: switch do_pan_and_scan off")
    return processor


def images_only(base: type[Any], video_size: Mapping[str, int] | None = None) -> type[Any]:
    """A subclass of a processor, under its name, that neither loads, keeps nor saves a video processor.

    Args:
        video_size: What its `video_processor.size` is: all that is asked of it.
    """

    def get_attributes(_cls: type[Any], /) -> list[str]:
        return [name for name in base.get_attributes() if name != VIDEO]

    def from_args_and_dict(_cls: type[Any], /, args: Any, fields: dict[str, Any], **kwargs: Any) -> Any:
        # SmolVLM has no default for it
        return base.from_args_and_dict.__func__(_cls, args, {**fields, VIDEO: None}, **kwargs)

    members = {
        "__module__": base.__module__,
        "get_attributes": classmethod(get_attributes),
        "from_args_and_dict": classmethod(from_args_and_dict),
        # SmolVLM asks it for the defaults of its chat template's arguments
        VIDEO: SimpleNamespace(num_frames=None, fps=None, size=video_size),
    }
    if base is SmolVLMProcessor:
        # it splits images as its predecessor does, and cannot tell
        members[COUNTS] = Idefics3Processor._get_num_multimodal_tokens
    return type(base.__name__, (base,), members)


def _video_size(path: Path) -> Mapping[str, int] | None:
    """The bounds of a video's pixels; None where the image processor's hold for videos, too."""
    for name, key in (("processor_config.json", VIDEO), ("video_preprocessor_config.json", None)):
        file = path / name
        if file.exists():
            settings = json.loads(file.read_text())
            found = (settings.get(key, {}) if key else settings).get("size") or {}
            if {"shortest_edge", "longest_edge"} <= found.keys():
                return {edge: int(found[edge]) for edge in ("shortest_edge", "longest_edge")}
    return None
