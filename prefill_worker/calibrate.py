"""`python -m prefill_worker.calibrate`: finds which layers of a checkpoint may share KV, for the policy `kv_sharer`.

The first layer of a pair lends to the second. Pairs are tried by the distance between the mean KV of their layers, the
largest first; one is taken when the model's last hidden states stay similar with it and all that were taken before.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel
from vlcache.v1 import inference_pb2 as public

from prefill_worker.compression.layer_sharing import FILE_NAME, LayerSharing, SharedPair
from prefill_worker.compression.sparse.kv_sharer import KVSharerPrefill
from prefill_worker.config import PrefillConfig
from prefill_worker.engine.engine import PrefillEngine
from prefill_worker.prompt import Prompt, PromptBuilder
from shared.command_line import parse_config
from shared.config import Dtype
from shared.errors import ServiceError
from shared.model.checkpoint import open_checkpoint
from shared.model.loading import checkpoint_hash, load_prefill_model
from shared.model.processor import load_processor


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """What is calibrated, and with which prompts."""

    model: str
    """Checkpoint: a directory, or a Hugging Face hub id; the outcome is written beside its weights."""
    prompts: Path
    """JSON list of prompts like those to come: {"images": [files beside it], "question": text}; others are ignored."""
    threshold: float = 0.5
    """What the cosine of the last hidden states with the undisturbed model's must exceed, in [-1, 1]."""
    dtype: Dtype = "auto"
    """Precision of the passes; what is found serves all."""
    device: str = "cpu"
    """torch device."""
    threads: int = 0
    """torch threads; 0 leaves torch's own choice."""

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold must lie in [-1, 1], not {self.threshold}")


class Calibration:
    """The passes over some prompts.

    Args:
        model: That of the engine.
        prompts: At least one.
    """

    def __init__(self, engine: PrefillEngine, model: PreTrainedModel, prompts: Sequence[Prompt]) -> None:
        self._engine = engine
        # whatever an engine changes in a pass, the last norm is the same module
        self._last_norm = model.get_decoder().norm
        self._prompts = prompts
        passes = [self._pass(prompt, {}) for prompt in prompts]
        self._undisturbed = [hidden for hidden, _ in passes]
        self._means = torch.stack([means for _, means in passes]).mean(dim=0)

    def pairs(self, threshold: float) -> Iterator[SharedPair]:
        """Those that are taken, in their order."""
        lender_of: dict[int, int] = {}
        for lender, borrower, distance in self.ranked():
            if {lender, borrower} & lender_of.keys() or borrower in lender_of.values():
                continue
            cosine = self.cosine({**lender_of, borrower: lender})
            if cosine > threshold:
                lender_of[borrower] = lender
                yield SharedPair(borrower=borrower, lender=lender, distance=distance, cosine=cosine)

    def ranked(self) -> list[tuple[int, int, float]]:
        """Lender, borrower and distance of all pairs, the most distant first, of equals the lower layers."""
        pairs = combinations(range(len(self._means)), 2)
        far = [(low, high, float((self._means[low] - self._means[high]).norm())) for low, high in pairs]
        return sorted(far, key=lambda pair: -pair[2])

    def cosine(self, lender_of: Mapping[int, int]) -> float:
        """Of the last hidden states with the undisturbed model's, mean over tokens of text, then over prompts."""
        similar = []
        for prompt, undisturbed in zip(self._prompts, self._undisturbed, strict=True):
            hidden, _ = self._pass(prompt, lender_of)
            similar.append(torch.nn.functional.cosine_similarity(hidden, undisturbed, dim=-1).mean().item())
        return fmean(similar)

    def _pass(self, prompt: Prompt, lender_of: Mapping[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Last hidden states of text [tokens, hidden_size], and per layer the mean K and V [num_layers, ..]; fp32."""
        seen: list[torch.Tensor] = []

        def keep(module: object, args: object, output: torch.Tensor) -> None:
            seen.append(output[0].float())

        watch = self._last_norm.register_forward_hook(keep)
        try:
            prefilled = self._engine.prefill(prompt, (), threading.Event(), KVSharerPrefill(lender_of))
        finally:
            watch.remove()
        layers = zip(prefilled.keys, prefilled.values, strict=True)
        means = [torch.cat((key, value)).float().mean(dim=1).flatten() for key, value in layers]
        # what follows an image token is never asked for
        return seen[-1][~prompt.shape.visual], torch.stack(means)


def calibrate(config: CalibrationConfig) -> LayerSharing:
    """Finds the pairs of a checkpoint and writes them beside it.

    Raises:
        FileNotFoundError: There is no such checkpoint, or no such prompt.
        UnsupportedModelError: The checkpoint's architecture cannot be served.
        InvalidRequestError: A prompt is refused, or the model does not allow passes that are changed.
        ValueError: There are no prompts, or no pair is similar enough.
    """
    checkpoint = open_checkpoint(
        PrefillConfig(model=config.model, dtype=config.dtype, device=config.device, threads=config.threads)
    )
    model = load_prefill_model(checkpoint.path, dtype=checkpoint.dtype, device=checkpoint.device)
    asked = read_prompts(config.prompts)
    most_images = max(len(message.parts) for message in asked)
    builder = PromptBuilder(load_processor(checkpoint.path), checkpoint.spec, max_images=most_images)
    prompts = [builder.build([message], max_new_tokens=1) for message in asked]
    pairs = tuple(Calibration(PrefillEngine(model), model, prompts).pairs(config.threshold))
    if not pairs:
        raise ValueError(f"no pair of layers reaches a cosine above {config.threshold}")
    tokens = sum(prompt.shape.num_tokens for prompt in prompts)
    sharing = LayerSharing(
        checkpoint=checkpoint_hash(checkpoint.path),
        threshold=config.threshold,
        prompts=f"{len(prompts)} prompts of {config.prompts.name}, {tokens} tokens",
        pairs=pairs,
    )
    sharing.save(checkpoint.path)
    return sharing


def read_prompts(file: Path) -> list[public.Message]:
    """The prompts of a file; see `CalibrationConfig.prompts`.

    Raises:
        FileNotFoundError: The file, or an image, is not there.
        ValueError: There is nothing in it, or something else.
    """
    try:
        messages = [_message(file.parent, entry) for entry in json.loads(file.read_text(encoding="utf-8"))]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a list of prompts, each with a question") from error
    if not messages:
        raise ValueError(f"{file} holds no prompts")
    return messages


def _message(folder: Path, entry: Mapping[str, Any]) -> public.Message:
    images = [public.Part(image=public.Image(data=(folder / name).read_bytes())) for name in entry.get("images", ())]
    return public.Message(role="user", parts=[*images, public.Part(text=entry["question"])])


def main(config: CalibrationConfig) -> None:
    """Calibrates, and says what was found."""
    try:
        sharing = calibrate(config)
    except (OSError, ValueError, ServiceError) as error:
        raise SystemExit(f"calibration: {error}") from error
    for pair in sharing.pairs:
        found = f"distance {pair.distance:.3f}, cosine {pair.cosine:.4f}"
        print(f"layer {pair.borrower} reads layer {pair.lender}: {found}")
    print(f"{len(sharing.pairs)} pairs, written to {FILE_NAME} beside the weights")


if __name__ == "__main__":
    main(parse_config(CalibrationConfig, "Finds which layers of a checkpoint may share KV."))
