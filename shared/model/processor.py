"""Loads the processor of a Hugging Face checkpoint. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor


def load_processor(path: Path) -> Any:
    """Tokenizer and image processor. Always the PIL backend: the torchvision one resizes slightly differently."""
    return AutoProcessor.from_pretrained(path, backend="pil")
