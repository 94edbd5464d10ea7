"""Turns scenes and questions into tensors: many questions share one image prefix, most patches are dropped.

Shapes: B scenes sets, N images each, K kept patches per image, Q questions of S tokens (padded).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from models.shapes_vlm.processor import ASSISTANT, BOS, EOS, USER
from models.shapes_vlm.questions import Question
from models.shapes_vlm.scenes import GRID_PATCHES, NUM_PATCHES, PATCH_PX, Scene

IGNORED = -100

Conversation = tuple[Question, ...]
"""Questions asked one after the other about the same images; mostly one."""


@dataclass(frozen=True, kw_only=True)
class PrefixBatch:
    """What all questions about the same images share."""

    patches: Tensor
    """[B * N, K, 588] kept patches, scaled to [-1, 1], in the channel order of the patch convolution."""
    kept: Tensor
    """[B * N, K] patch indices, ascending."""
    token_ids: Tensor
    """[P] the prefix as token ids; image tokens stand where patches go."""
    is_image: Tensor
    """[P] bool."""
    positions: Tensor
    """[B, P] positions in the full prompt: dropping patches never renumbers."""


@dataclass(frozen=True, kw_only=True)
class QuestionBatch:
    """Conversations of about equal length, all about the prefix of their row."""

    token_ids: Tensor
    """[B, Q, S], padded on the right."""
    targets: Tensor
    """[B, Q, S] the next token where it belongs to the answer, IGNORED elsewhere."""
    weights: Tensor
    """[B, Q, S] float32: 1 / sqrt(answer length) on answer tokens, so that long answers do not drown short ones."""
    first_position: int
    """Position of the first question token in the full prompt."""


def patchify(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[336, 336, 3] uint8 -> [576, 588] in [-1, 1], each patch in (channel, row, column) order."""
    grid = pixels.reshape(GRID_PATCHES, PATCH_PX, GRID_PATCHES, PATCH_PX, 3).transpose(0, 2, 4, 1, 3)
    return grid.reshape(NUM_PATCHES, -1).astype(np.float32) / 127.5 - 1


def keep_patches(rng: np.random.Generator, scene: Scene, num_kept: int) -> NDArray[np.int64]:
    """All used patches and a random rest: [num_kept], ascending."""
    order = rng.random(NUM_PATCHES)
    order[list(scene.used_patches)] -= 1
    return np.sort(np.argpartition(order, num_kept - 1)[:num_kept]).astype(np.int64)


class Encoder:
    """Encodes prefixes and questions exactly as the chat template and the processor do."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_token_id: int) -> None:
        self._tokenizer = tokenizer
        self._image_token_id = image_token_id
        self._pad_token_id: int = tokenizer.convert_tokens_to_ids("<pad>")
        self._cache: dict[str, list[int]] = {}

    def prefix(self, rng: np.random.Generator, rows: Sequence[Sequence[Scene]], num_kept: int) -> PrefixBatch:
        """`rows`: B sets of N scenes."""
        scenes = [scene for row in rows for scene in row]
        kept = np.stack([keep_patches(rng, scene, num_kept) for scene in scenes])
        patches = np.stack([patchify(s.pixels)[k] for s, k in zip(scenes, kept, strict=True)])
        ids, positions = self._prefix_layout(len(rows), len(rows[0]), kept)
        return PrefixBatch(
            patches=torch.from_numpy(patches),
            kept=torch.from_numpy(kept),
            token_ids=torch.tensor(ids),
            is_image=torch.tensor(ids) == self._image_token_id,
            positions=torch.from_numpy(positions),
        )

    def prefix_length(self, num_images: int) -> int:
        """Tokens before the question in the full prompt."""
        return len(self._head()) + sum(len(self._label(i)) + NUM_PATCHES for i in range(num_images))

    def questions(self, rows: Sequence[Sequence[Conversation]], *, num_images: int) -> QuestionBatch:
        """`rows`: B rows of Q conversations."""
        encoded = [[self._conversation(conversation) for conversation in row] for row in rows]
        length = max(len(tokens) for row in encoded for tokens, _ in row) - 1
        shape = (len(encoded), len(encoded[0]), length)
        ids = np.full(shape, self._pad_token_id)
        targets, weights = np.full(shape, IGNORED), np.zeros(shape, dtype=np.float32)
        for b, row in enumerate(encoded):
            for q, (tokens, spans) in enumerate(row):
                ids[b, q, : len(tokens) - 1] = tokens[:-1]
                for start, end in spans:
                    targets[b, q, start - 1 : end - 1] = tokens[start:end]
                    weights[b, q, start - 1 : end - 1] = (end - start) ** -0.5
        return QuestionBatch(
            token_ids=torch.from_numpy(ids),
            targets=torch.from_numpy(targets),
            weights=torch.from_numpy(weights),
            first_position=self.prefix_length(num_images),
        )

    def _prefix_layout(
        self, num_rows: int, num_images: int, kept: NDArray[np.int64]
    ) -> tuple[list[int], NDArray[np.int64]]:
        num_kept = kept.shape[1]
        ids, columns, start = self._head(), [np.tile(np.arange(len(self._head())), (num_rows, 1))], len(self._head())
        by_row = kept.reshape(num_rows, num_images, num_kept)
        for i in range(num_images):
            label = self._label(i)
            ids = ids + label + [self._image_token_id] * num_kept
            columns.append(np.tile(start + np.arange(len(label)), (num_rows, 1)))
            columns.append(start + len(label) + by_row[:, i])
            start += len(label) + NUM_PATCHES
        return ids, np.concatenate(columns, axis=1)

    def _conversation(self, turns: Conversation) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids after the prefix, and where the answers lie in them."""
        tokens: list[int] = []
        spans = []
        for turn, question in enumerate(turns):
            tokens += self._encode((USER if turn else "") + question.text + ASSISTANT)
            answer = self._encode(question.answer + EOS)
            spans.append((len(tokens), len(tokens) + len(answer)))
            tokens += answer
        return tokens, spans

    def _head(self) -> list[int]:
        return self._encode(BOS + USER)

    def _label(self, index: int) -> list[int]:
        return self._encode(f"Image {index + 1}:")

    def _encode(self, text: str) -> list[int]:
        ids = self._cache.get(text)
        if ids is None:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            if len(self._cache) < 100_000:
                self._cache[text] = ids
        return list(ids)
