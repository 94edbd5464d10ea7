"""What a pass takes from earlier ones and leaves to later ones, by what their prompts contain."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefill_worker.compression.statistics import Statistic
from prefill_worker.engine.content_cache import ContentCache
from prefill_worker.engine.content_key import ContentKeys
from prefill_worker.engine.prefix import Prefix, prefix_tokens, suffices
from prefill_worker.prompt import Prompt


@dataclass(frozen=True, kw_only=True)
class Recalled:
    """What is known of one prompt.

    Attributes:
        image_keys: Names of its images; none where nothing is kept.
        name: Of its beginning; None where that is not worth keeping, or nothing is kept.
        prefix: The KV of that beginning, which need not pass; None where all of the prompt must.
        kept_tokens: So many of its first tokens will be kept; 0 where they are known already, or not worth it.
    """

    image_keys: Sequence[bytes] = ()
    name: bytes | None = None
    prefix: Prefix | None = None
    kept_tokens: int = 0


class Memory:
    """Names contents and finds what is kept of them. In the model thread.

    Args:
        features: What the vision tower made of images.
        prefixes: KV of prompts up to their last image.
    """

    def __init__(self, features: ContentCache[torch.Tensor], prefixes: ContentCache[Prefix]) -> None:
        self._keys = ContentKeys()
        self._features = features
        self._prefixes = prefixes

    def recall(self, prompt: Prompt, statistics: Collection[Statistic[Any]], *, sparse: bool) -> Recalled:
        """What is known of a prompt.

        Args:
            statistics: What is measured in the pass: some need all of the prompt's queries.
            sparse: Whether a policy changes the pass; what it computes is of no use to another.
        """
        images = self._image_keys(prompt)
        name = None if sparse else self._prefix_key(prompt, images)
        if name is None:
            return Recalled(image_keys=images)
        known = self._prefixes.get(name)
        return Recalled(
            image_keys=images,
            name=name,
            prefix=known if suffices(statistics, prompt.shape) else None,
            kept_tokens=prefix_tokens(prompt.shape) if known is None else 0,
        )

    def keep(self, recalled: Recalled, begins: Prefix) -> None:
        """Keeps how a prompt began that has passed."""
        if recalled.name is not None and recalled.kept_tokens:
            self._prefixes.put(recalled.name, begins)

    def _image_keys(self, prompt: Prompt) -> list[bytes]:
        if not (self._features.on or self._prefixes.on):
            return []
        return [self._keys.of_image(prompt.tenant, image) for image in prompt.images]

    def _prefix_key(self, prompt: Prompt, image_keys: Sequence[bytes]) -> bytes | None:
        tokens = prefix_tokens(prompt.shape)
        if not (self._prefixes.on and tokens and image_keys):
            return None
        ids, positions = prompt.inputs["input_ids"][0, :tokens], prompt.position_ids[..., :tokens]
        return self._keys.of_prefix(prompt.tenant, ids, positions, image_keys)
