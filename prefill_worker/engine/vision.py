"""Images as the language model reads them. The vision tower sees each image alone: what it makes of one depends on
nothing else, so it can be kept."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from prefill_worker.engine.content_cache import ContentCache
from prefill_worker.prompt import ProcessedImage, Prompt
from shared.errors import RequestCancelledError

# Under this name inputs carry what deeper layers read: models pass what they do not know on to their language model.
DEEPER = "vlc_deepstack"


class VisionEncoder:
    """Makes what the language model reads of prompts. In the model thread.

    Args:
        model: The whole model, or a language model alone where no prompt has images.
        cache_bytes: What features of images may be kept for later prompts; 0 keeps none.

    Attributes:
        deepstack: Whether deeper layers, too, read of images: features of inner layers of the vision tower.
    """

    def __init__(self, model: PreTrainedModel, cache_bytes: int) -> None:
        self._model = model
        self.cache: ContentCache[torch.Tensor] = ContentCache(cache_bytes)
        vision = getattr(model.config, "vision_config", None)
        self.deepstack = bool(getattr(vision, "deepstack_visual_indexes", None))
        if self.deepstack:
            model.get_decoder().register_forward_pre_hook(_read_deeper, with_kwargs=True)

    def encode(
        self, prompt: Prompt, image_keys: Sequence[bytes], cancelled: threading.Event
    ) -> tuple[torch.Tensor | None, int]:
        """What the language model reads of a prompt's images, and how many of them were not encoded anew.

        Args:
            image_keys: Names of the images; only looked at when something is kept.

        Returns:
            The former is [levels, num_visual_tokens, hidden], see `_features`; None without images.

        Raises:
            RequestCancelledError: `cancelled` was set; checked before every image.
        """
        images = prompt.images
        if not images:
            return None, 0
        names = image_keys if self.cache.on else [None] * len(images)
        encoded = [self._features(image, name, cancelled) for image, name in zip(images, names, strict=True)]
        features, known = torch.cat([feature for feature, _ in encoded], dim=1), sum(known for _, known in encoded)
        if features.shape[1] != prompt.shape.num_visual:
            raise ValueError(f"{features.shape[1]} image features for {prompt.shape.num_visual} visual tokens")
        return features, known

    def inputs(self, prompt: Prompt, tokens: range, features: torch.Tensor | None) -> dict[str, Any]:
        """The model's inputs for some of a prompt's tokens.

        Args:
            features: Of the whole prompt, as `encode` made them; None where none of these tokens stands for an image.
        """
        piece = slice(tokens.start, tokens.stop)
        ids, visual = prompt.inputs["input_ids"][:, piece], prompt.shape.visual[piece]
        if features is None or not visual.any():
            return self._read_text(ids)
        before = int(prompt.shape.visual[: tokens.start].sum())
        features = features[:, before : before + int(visual.sum())]
        (text,) = self._read_text(ids).values()
        places = visual.to(text.device)[None]
        first, *deeper = features.to(text.dtype)
        inputs: dict[str, Any] = {"inputs_embeds": text.masked_scatter(places[..., None], first)}
        if self.deepstack:
            inputs[DEEPER] = (places, deeper)
        return inputs

    def _read_text(self, tokens: torch.Tensor) -> dict[str, Any]:
        """The model's inputs for tokens [1, num_tokens] that stand for no images."""
        return {"inputs_embeds": self._model.get_input_embeddings()(tokens.to(self._model.device))}

    def _features(
        self, image: ProcessedImage, name: bytes | None, cancelled: threading.Event
    ) -> tuple[torch.Tensor, bool]:
        """What the vision tower makes of an image, [levels, num_tokens, hidden], and whether it had done so before.

        The first level is read in place of placeholder tokens, the others in deeper layers.
        """
        if cancelled.is_set():
            raise RequestCancelledError("cancelled before an image")
        if name is None:
            return self._encode(image), False
        features = self.cache.get(name)
        if features is not None:
            return features, True
        features = self._encode(image)
        self.cache.put(name, features)
        return features, False

    def _encode(self, image: ProcessedImage) -> torch.Tensor:
        device, dtype = self._model.device, self._model.dtype
        moved = {name: tensor.to(device) for name, tensor in image.items()}
        moved["pixel_values"] = moved["pixel_values"].to(dtype)
        made = self._model.get_image_features(**moved, return_dict=True)
        deeper = made.deepstack_features if self.deepstack else ()
        # a tensor of its own: a view would keep what it was cut from
        return torch.stack([_joined(level) for level in (made.pooler_output, *deeper)])


def _joined(views: torch.Tensor | Iterable[torch.Tensor]) -> torch.Tensor:
    """[num_tokens, hidden] of views [.., tokens, hidden]; transformers 5.17 has joined those of inner layers."""
    if isinstance(views, torch.Tensor):
        return views.flatten(0, -2)
    return torch.cat([view.flatten(0, -2) for view in views])


def _read_deeper(
    language_model: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hands over what the whole model would have, had it run its vision tower itself."""
    if DEEPER in named:
        named["visual_pos_masks"], named["deepstack_visual_embeds"] = named.pop(DEEPER)
    return inputs, named
