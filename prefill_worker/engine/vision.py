"""Images as the language model reads them. The vision tower sees each image alone: what it makes of one depends on
nothing else, so it can be kept."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from prefill_worker.engine.content_cache import ContentCache
from prefill_worker.prompt import ProcessedImage, Prompt
from shared.errors import RequestCancelledError


class VisionEncoder:
    """Makes the input embeddings of prompts. In the model thread.

    Args:
        model: The whole model, or a language model alone where no prompt has images.
        cache_bytes: What features of images may be kept for later prompts; 0 keeps none.
    """

    def __init__(self, model: PreTrainedModel, cache_bytes: int) -> None:
        self._model = model
        self.cache: ContentCache[torch.Tensor] = ContentCache(cache_bytes)

    def embed(
        self, prompt: Prompt, image_keys: Sequence[bytes], cancelled: threading.Event
    ) -> tuple[torch.Tensor, int]:
        """The embeddings of a prompt, [1, num_tokens, hidden], and how many of its images were not encoded anew.

        Args:
            image_keys: Names of the images; only looked at when something is kept.

        Raises:
            RequestCancelledError: `cancelled` was set; checked before every image.
        """
        text = self.embed_text(prompt.inputs["input_ids"])
        images = prompt.images
        if not images:
            return text, 0
        names = image_keys if self.cache.on else [None] * len(images)
        encoded = [self._features(image, name, cancelled) for image, name in zip(images, names, strict=True)]
        features = torch.cat([feature for feature, _ in encoded]).to(text.dtype)
        if len(features) != prompt.shape.num_visual:
            raise ValueError(f"{len(features)} image features for {prompt.shape.num_visual} visual tokens")
        visual = prompt.shape.visual.to(text.device)[None, :, None]
        return text.masked_scatter(visual, features), sum(known for _, known in encoded)

    def embed_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """The embeddings of tokens [1, num_tokens] that stand for no images, [1, num_tokens, hidden]."""
        return self._model.get_input_embeddings()(tokens.to(self._model.device))

    def _features(
        self, image: ProcessedImage, name: bytes | None, cancelled: threading.Event
    ) -> tuple[torch.Tensor, bool]:
        """What the vision tower makes of an image, [num_tokens, hidden], and whether it had done so before."""
        if cancelled.is_set():
            raise RequestCancelledError("cancelled before an image")
        if name is None:
            return self._encode(image), False
        features = self.cache.get(name)
        if features is not None:
            return features, True
        # a view would keep what it was cut from
        features = self._encode(image).clone()
        self.cache.put(name, features)
        return features, False

    def _encode(self, image: ProcessedImage) -> torch.Tensor:
        device, dtype = self._model.device, self._model.dtype
        moved = {name: tensor.to(device) for name, tensor in image.items()}
        moved["pixel_values"] = moved["pixel_values"].to(dtype)
        (features,) = self._model.get_image_features(**moved, return_dict=True).pooler_output
        return features
