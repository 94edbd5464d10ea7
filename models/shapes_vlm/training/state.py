"""Saving, resuming and exporting."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from models.shapes_vlm.architecture import generation_config
from models.shapes_vlm.training.weights import MasterWeights

STATE_FILE = "state.pt"


def save_state(out: Path, step: int, weights: MasterWeights) -> None:
    """Atomic: a run killed while saving still resumes from the state before."""
    state = {"step": step, **weights.state_dict()}
    torch.save(state, out / "state.tmp")
    os.replace(out / "state.tmp", out / STATE_FILE)


def load_state(out: Path, weights: MasterWeights) -> int:
    """The number of steps already done: 0 where there is nothing to resume."""
    path = out / STATE_FILE
    if not path.exists():
        return 0
    state: dict[str, Any] = torch.load(path, weights_only=True)
    weights.load_state_dict(state)
    return int(state["step"])


def export(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Writes a folder that plain Auto classes load."""
    model.generation_config = generation_config(processor.tokenizer)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
