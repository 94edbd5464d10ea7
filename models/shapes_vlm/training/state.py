"""Saving, resuming and exporting."""

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from models.shapes_vlm.architecture import generation_config
from models.shapes_vlm.training.weights import MasterWeights

STATE_FILE = "state.safetensors"


def save_state(out: Path, step: int, weights: MasterWeights) -> None:
    """Atomic: a run killed while saving still resumes from the state before."""
    tensors = {name: tensor.contiguous() for name, tensor in weights.tensors().items()}
    save_file(tensors, out / "state.tmp", metadata={"step": str(step)})
    os.replace(out / "state.tmp", out / STATE_FILE)


def load_state(out: Path, weights: MasterWeights) -> int:
    """The number of steps already done: 0 where there is nothing to resume."""
    path = out / STATE_FILE
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        weights.restore({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  # not a dict
        return int(file.metadata()["step"])


def export(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Writes a folder that plain Auto classes load."""
    model.generation_config = generation_config(processor.tokenizer)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
