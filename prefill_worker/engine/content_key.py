"""Names of contents, as far as one tenant and one run of the worker go."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping

import torch

KEY_BYTES = 32


class ContentKeys:
    """Keyed hashes: nobody can make another content of the same key, nor meet those of another tenant."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(hashlib.blake2b.MAX_KEY_SIZE)

    def of_image(self, tenant: str, image: Mapping[str, torch.Tensor]) -> bytes:
        """The key of one image as the image processor made it, on the CPU."""
        content = self._begin(tenant, b"image")
        for name in sorted(image):
            content.update(f"{name} {image[name].dtype} {tuple(image[name].shape)}".encode())
            content.update(_bytes_of(image[name]))
        return content.digest()

    def of_prefix(self, tenant: str, tokens: torch.Tensor, positions: torch.Tensor, images: Iterable[bytes]) -> bytes:
        """The key of a prompt's beginning: its tokens, on the CPU, and the keys of the images that some stand for.

        Args:
            positions: Of the tokens: the same frames may be shown at another speed.
        """
        content = self._begin(tenant, b"prefix")
        for each in (tokens, positions):
            content.update(f"{each.dtype} {tuple(each.shape)}".encode())
            content.update(_bytes_of(each))
        for image in images:
            content.update(image)
        return content.digest()

    def _begin(self, tenant: str, kind: bytes) -> hashlib.blake2b:
        salt = hashlib.blake2b(tenant.encode(), key=self._secret).digest()
        return hashlib.blake2b(key=salt, digest_size=KEY_BYTES, person=kind)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data
