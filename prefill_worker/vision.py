"""Images as the language model reads them. The vision tower sees each image alone: what it makes of one depends on
nothing else, so it can be kept."""

from __future__ import annotations

import threading

import torch
from transformers import PreTrainedModel

from prefill_worker.content_key import ContentKeys
from prefill_worker.prompt import Prompt
from prefill_worker.vision_cache import VisionCache
from shared.errors import RequestCancelledError


class VisionEncoder:
    """Makes the input embeddings of prompts. In the model thread.

    Args:
        model: The whole model, or a language model alone where no prompt has images.
        cache_bytes: What features of images may be kept for later prompts; 0 keeps none.
    """

    def __init__(self, model: PreTrainedModel, cache_bytes: int) -> None:
        self._model = model
        self._keys = ContentKeys()
        self._keeps = cache_bytes > 0
        self.cache = VisionCache(cache_bytes)

    def embed(self, prompt: Prompt, cancelled: threading.Event) -> tuple[torch.Tensor, int]:
        """The embeddings of a prompt, [1, num_tokens, hidden], and how many of its images were not encoded anew.

        Raises:
            RequestCancelledError: `cancelled` was set; checked before every image.
        """
        text = self._model.get_input_embeddings()(prompt.inputs["input_ids"].to(self._model.device))
        images = _images(prompt)
        if not images:
            return text, 0
        encoded = [self._features(image, prompt.tenant, cancelled) for image in images]
        features = torch.cat([feature for feature, _ in encoded]).to(text.dtype)
        if len(features) != prompt.shape.num_visual:
            raise ValueError(f"{len(features)} image features for {prompt.shape.num_visual} visual tokens")
        visual = prompt.shape.visual.to(text.device)[None, :, None]
        return text.masked_scatter(visual, features), sum(kept for _, kept in encoded)

    def _features(
        self, image: dict[str, torch.Tensor], tenant: str, cancelled: threading.Event
    ) -> tuple[torch.Tensor, bool]:
        """What the vision tower makes of an image, [num_tokens, hidden], and whether it had done so before."""
        if cancelled.is_set():
            raise RequestCancelledError("cancelled before an image")
        if not self._keeps:
            return self._encode(image), False
        key = self._keys.of(tenant, image)
        features = self.cache.get(key)
        if features is not None:
            return features, True
        features = self._encode(image)
        self.cache.put(key, features)
        return features, False

    def _encode(self, image: dict[str, torch.Tensor]) -> torch.Tensor:
        device, dtype = self._model.device, self._model.dtype
        moved = {name: tensor.to(device) for name, tensor in image.items()}
        moved["pixel_values"] = moved["pixel_values"].to(dtype)
        (features,) = self._model.get_image_features(**moved, return_dict=True).pooler_output
        return features


def _images(prompt: Prompt) -> list[dict[str, torch.Tensor]]:
    """What the image processor made, image by image."""
    if "pixel_values" not in prompt.inputs:
        return []
    made = {name: tensor for name, tensor in prompt.inputs.items() if name != "input_ids"}
    count = len(made["pixel_values"])
    return [{name: tensor[index : index + 1] for name, tensor in made.items()} for index in range(count)]
