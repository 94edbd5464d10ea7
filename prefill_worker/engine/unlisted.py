"""A family that has no entry in `preprocess/families.py` is served if it behaves like the default, which is found out
before anything is served: our pass over a prompt of two images must be the model's own."""

from __future__ import annotations

import io
import logging
import threading
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel
from vlcache.v1 import inference_pb2 as pb

from prefill_worker.engine.engine import PrefillEngine
from prefill_worker.engine.observer import PrefillObserver
from prefill_worker.engine.prompt_cache import PromptCache
from prefill_worker.preprocess.families import FAMILIES
from prefill_worker.prompt import Prompt, PromptBuilder
from shared.model.spec import VLMSpec
from shared.model.support import UnsupportedModelError

log = logging.getLogger(__name__)

# Neither of them square, so that rows and columns differ.
SIZES = ((96, 64), (64, 160))
QUESTION = "What differs?"
# Of the logits' norm: rounding is far below, a feature in a wrong place far above.
TOLERANCE = 0.05


def check_unlisted(model: PreTrainedModel, processor: Any, spec: VLMSpec) -> None:
    """Compares two passes where the family has no entry.

    Raises:
        UnsupportedModelError: They differ, or one of them cannot be made.
    """
    if spec.model_type in FAMILIES:
        return
    log.warning("%s is no family that is known: trying whether it behaves like most", spec.model_type)
    try:
        error = _error(model, processor, spec)
    # whatever its code trips over
    except Exception as raised:
        raise UnsupportedModelError(_reason(spec, f"{type(raised).__name__}: {raised}")) from raised
    if not error < TOLERANCE:
        raise UnsupportedModelError(_reason(spec, f"the logits of a prompt are {error:.0%} off"))


def _reason(spec: VLMSpec, what: str) -> str:
    return f"{spec.model_type} has no entry in families.py and cannot be served as most are: {what}"


@torch.inference_mode()
def _error(model: PreTrainedModel, processor: Any, spec: VLMSpec) -> float:
    images = [Image.effect_noise(size, 64).convert("RGB") for size in SIZES]
    prompt = _prompt(processor, spec, images)
    ours = PrefillEngine(model).prefill(prompt, (), threading.Event()).logits
    theirs = _own_pass(model, processor, prompt, images)
    return ((ours - theirs).norm() / theirs.norm()).item()


def _prompt(processor: Any, spec: VLMSpec, images: list[Image.Image]) -> Prompt:
    parts = [pb.Part(image=pb.Image(data=_png(image))) for image in images]
    message = pb.Message(role="user", parts=[*parts, pb.Part(text=QUESTION)])
    return PromptBuilder(processor, spec, max_images=len(images)).build([message], max_new_tokens=1)


def _own_pass(model: PreTrainedModel, processor: Any, prompt: Prompt, images: list[Image.Image]) -> torch.Tensor:
    """The logits [vocab] that the model makes of all that its processor makes."""
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[images], text=[text], add_special_tokens=False, return_tensors="pt")
    moved = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    moved["pixel_values"] = moved["pixel_values"].to(model.dtype)
    hook = PrefillObserver(prompt.shape, (), threading.Event(), ())
    output = model(**moved, past_key_values=PromptCache(), use_cache=True, logits_to_keep=1, vlc=hook)
    return output.logits[0, -1].float()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
