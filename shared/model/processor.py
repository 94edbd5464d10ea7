"""Loads the processor of a Hugging Face checkpoint, for images alone. Needs neither torch nor torchvision.

transformers' video processors exist for torchvision only, and a processor that has one cannot be built without it, even
if no video is ever shown to it.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

VIDEO = "video_processor"
# How a processor tells what images of given sizes become.
COUNTS = "_get_num_multimodal_tokens"


def load_processor(path: Path) -> Any:
    """Tokenizer and image processor. Always the PIL backend: the torchvision one resizes slightly differently.

    Raises:
        ValueError: transformers has none for this kind of model, or it cuts images so that nobody can tell how often.
    """
    config = AutoConfig.from_pretrained(path)
    if type(config) not in PROCESSOR_MAPPING:
        raise ValueError(f"transformers has no processor for {config.model_type}")
    processor = images_only(PROCESSOR_MAPPING[type(config)]).from_pretrained(path, backend="pil")
    if getattr(processor.image_processor, "do_pan_and_scan", False):
        raise ValueError("images that are cut by pan and scan are not supported: switch do_pan_and_scan off")
    return processor


def images_only(base: type[Any]) -> type[Any]:
    """A subclass of a processor, under its name, that neither loads, keeps nor saves a video processor."""

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
        VIDEO: SimpleNamespace(num_frames=None, fps=None),
    }
    if base is SmolVLMProcessor:
        # it splits images as its predecessor does, and cannot tell
        members[COUNTS] = Idefics3Processor._get_num_multimodal_tokens
    return type(base.__name__, (base,), members)
