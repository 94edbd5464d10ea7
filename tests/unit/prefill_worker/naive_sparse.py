"""FastV and ZipVL by loops over attention matrices; they share no code with the policies."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.unit.prefill_worker.naive_pass import Rule


class NaiveFastV(Rule):
    """Before layer `layer` all image tokens but the best `images` leave."""

    def __init__(self, visual: Sequence[bool], layer: int, images: int) -> None:
        self.visual, self.layer, self.images = visual, layer, images

    def left_before(self, layer: int, attention: list[torch.Tensor], present: list[int]) -> list[int]:
        if layer != self.layer:
            return present
        last = [attention[-1][:, -1, at].mean().item() for at in range(len(self.visual))]
        images = [at for at in present if self.visual[at] and at != len(self.visual) - 1]
        best = sorted(images, key=lambda at: (-last[at], at))[: self.images]
        return [at for at in present if at in best or not self.visual[at] or at == len(self.visual) - 1]


def naive_importance(attention: list[list[list[float]]], rows: Sequence[int], theta: float) -> tuple[list[int], list]:
    """The important positions, ascending, and the scores; attention is [heads, tokens, tokens]."""
    tokens = len(attention[0])
    sums, scores = [], []
    for at in range(tokens):
        received = [sum(head[row][at] for head in attention) / len(attention) for row in rows if row >= at]
        sums.append(sum(received))
        scores.append(sum(received) / len(received))
    count, held = 0, 0.0
    for value in sorted(sums, reverse=True):
        if held >= theta * len(rows):
            break
        count, held = count + 1, held + value
    others = sorted(range(tokens - 1), key=lambda at: (-scores[at], at))
    return sorted([tokens - 1, *others[: count - 1]]), scores


class NaiveZipVL(Rule):
    """In each layer the important tokens attend among themselves."""

    def __init__(self, rows: Sequence[int], theta: float) -> None:
        self.rows, self.theta = rows, theta

    def attending(self, attention: torch.Tensor, present: list[int]) -> list[int]:
        return naive_importance(attention.tolist(), self.rows, self.theta)[0]
