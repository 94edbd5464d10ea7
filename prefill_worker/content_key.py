"""Names of images by what they show, as far as one tenant and one run of the worker go."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping

import torch

KEY_BYTES = 32


class ContentKeys:
    """Keyed hashes: nobody can make another image of the same key, nor meet those of another tenant."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(hashlib.blake2b.MAX_KEY_SIZE)

    def of(self, tenant: str, image: Mapping[str, torch.Tensor]) -> bytes:
        """The key of one image as the image processor made it, on the CPU."""
        salt = hashlib.blake2b(tenant.encode(), key=self._secret).digest()
        content = hashlib.blake2b(key=salt, digest_size=KEY_BYTES)
        for name in sorted(image):
            tensor = image[name].contiguous()
            content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            content.update(tensor.view(torch.uint8).numpy().data)
        return content.digest()
