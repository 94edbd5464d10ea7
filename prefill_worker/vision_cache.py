"""What the vision tower has made of images, kept for the next request that shows one of them."""

from __future__ import annotations

from collections import OrderedDict

import torch


class VisionCache:
    """Owner of the features that are kept, the least recently used leave first. In the model thread.

    Args:
        capacity_bytes: Memory of the model's device that they may take together; 0 keeps nothing.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._features: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of what is kept; may be read from any thread."""
        return self._used_bytes

    def get(self, key: bytes) -> torch.Tensor | None:
        """The features of an image, [num_tokens, hidden]; never to be written to."""
        features = self._features.get(key)
        if features is not None:
            self._features.move_to_end(key)
        return features

    def put(self, key: bytes, features: torch.Tensor) -> None:
        """Keeps the features of an image that was not kept, if there can be room for them."""
        assert key not in self._features, "what is kept is not made again"
        if features.nbytes > self._capacity_bytes:
            return
        while self._used_bytes + features.nbytes > self._capacity_bytes:
            _, oldest = self._features.popitem(last=False)
            self._used_bytes -= oldest.nbytes
        # a view would keep what it was cut from
        self._features[key] = features.clone()
        self._used_bytes += features.nbytes

    def check_integrity(self) -> None:
        """Asserts that the count of bytes is that of the tensors, and within bounds."""
        assert self._used_bytes == sum(features.nbytes for features in self._features.values())
        assert self._used_bytes <= self._capacity_bytes
