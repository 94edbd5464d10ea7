"""Caches as plain lists of tokens in their order, double precision, with the rules as the papers' code has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from shared.kv.eviction import Eviction, FixedSlot, HeavyHitters, Recall, Scope, SharedLayers, SparseRead, TextGuard


@dataclass(eq=False)
class Token:
    """`order` counts from the prompt's end: its kept tokens up to -1, generated ones from 0."""

    order: int
    key: np.ndarray
    value: np.ndarray
    score: float = 0.0
    attention: float = 0.0


Cache = list[Token]


class Twin:
    """One sequence; a `LayerHook` for a batch of one.

    Args:
        pairs: K and V [kept, head_dim] of each layer and KV head, layer-major.
        prompt_tokens: Before compression.
        scores: Of each kept row, layer-major, head after head.
    """

    def __init__(
        self,
        eviction: Eviction | None,
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
        layers: int,
        prompt_tokens: int,
        scores: Sequence[float] = (),
    ) -> None:
        self.eviction, self.prompt_tokens, self.generated = eviction, prompt_tokens, 0
        caches, known = [], iter(scores)
        for keys, values in pairs:
            cache = [
                Token(order - len(keys), keys[order].double().numpy(), values[order].double().numpy())
                for order in range(len(keys))
            ]
            for token in cache:
                token.score = next(known, 0.0)
            caches.append(cache)
        heads = len(pairs) // layers
        self.layers = [caches[layer * heads : (layer + 1) * heads] for layer in range(layers)]
        self.kept = [[len(cache) for cache in caches] for caches in self.layers]
        self._selected: list[list[Token]] | None = None
        self._thresholds: dict[int, float] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, scaling: float
    ) -> torch.Tensor:
        """One query, [1, heads, 1, head_dim]."""
        if isinstance(self.eviction, SharedLayers) and layer in self.eviction.borrowers:
            return self._read_lender(layer, query, scaling)
        caches = self.layers[layer]
        group = query.shape[1] // len(caches)
        outputs = []
        for head, cache in enumerate(caches):
            new = Token(self.generated, key[0, head, 0].double().numpy(), value[0, head, 0].double().numpy())
            cache.append(new)
            readable = self._readable(layer, head, new)
            weights = []
            for member in range(group):
                row = query[0, head * group + member, 0].double().numpy()
                logits = np.array([token.key @ row * scaling for token in readable])
                weights.append(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())
                outputs.append(sum(weight * token.value for weight, token in zip(weights[-1], readable, strict=True)))
            for token, attention in zip(readable, np.sum(weights, axis=0), strict=True):
                token.attention = float(attention)
                token.score += token.attention
        self._select(layer)
        return torch.from_numpy(np.stack(outputs))[None, None].to(query.dtype)

    def complete(self) -> None:
        """After the last layer."""
        self.generated += 1
        self._selected = None
        for layer, caches in enumerate(self.layers):
            match self.eviction:
                case FixedSlot():
                    self._fixed_slot(self.eviction, layer, caches)
                case HeavyHitters():
                    for cache in caches:
                        heavy_hitters(self.eviction, cache)
                case Recall():
                    self._recall(self.eviction, layer, caches)
                case Scope():
                    for cache in caches:
                        self._scope(self.eviction, cache)
                case TextGuard():
                    self._text_guard(self.eviction, layer, caches)

    def orders(self) -> list[list[int]]:
        """What is left of each layer and KV head."""
        return [[token.order for token in cache] for caches in self.layers for cache in caches]

    def rows(self) -> list[list[Token]]:
        return [cache for caches in self.layers for cache in caches]

    def _fixed_slot(self, numbers: FixedSlot, layer: int, caches: list[Cache]) -> None:
        for cache, kept in zip(caches, self.kept[layer], strict=True):
            slot = kept + numbers.distance
            if slot < 1:
                slot = kept // 2
            seen = self.prompt_tokens + self.generated
            if int(len(cache) - seen * numbers.retention[layer]) > 0:
                del cache[slot]

    def _recall(self, numbers: Recall, layer: int, caches: list[Cache]) -> None:
        """D2O merges what it drops into the token with the most similar key, if that is similar enough."""
        if len(caches[0]) <= numbers.budget[layer]:
            return
        meetings = []
        for cache in caches:
            candidates = cache[numbers.sinks : len(cache) - numbers.recent[layer]]
            victim = min(candidates, key=lambda token: token.score)
            cache.remove(victim)
            similar = [cosine(victim.key, token.key) for token in cache]
            best = int(np.argmax(similar))
            meetings.append((victim, cache[best], similar[best]))
        mean = float(np.mean([similar for _, _, similar in meetings]))
        threshold = (self._thresholds.get(layer, mean) + mean) / 2
        self._thresholds[layer] = threshold
        for victim, token, similar in meetings:
            if similar >= threshold:
                token.key = (token.key + similar * victim.key) / 2
                token.value = (token.value + similar * victim.value) / 2

    def _scope(self, numbers: Scope, cache: Cache) -> None:
        if numbers.variant == "discontinuous" and self.generated % numbers.delta:
            return
        budget = numbers.window
        if numbers.variant != "slide":
            budget = min(numbers.window, numbers.recent + self.generated // numbers.delta)
        decoded = [token for token in cache if token.order >= 0]
        older, recent = decoded[: -numbers.recent], decoded[-numbers.recent :]
        best = sorted(older, key=lambda token: token.attention, reverse=True)[: budget - numbers.recent]
        cache[:] = [token for token in cache if token.order < 0 or token in best or token in recent]

    def _text_guard(self, numbers: TextGuard, layer: int, caches: list[Cache]) -> None:
        length, seen = len(caches[0]), self.prompt_tokens + self.generated
        candidates = range(numbers.sinks, length - numbers.text[layer])
        if int(length - seen * numbers.retention[layer]) > 0 and candidates:
            mean = [np.mean([cache[place].attention for cache in caches]) for place in range(length)]
            victim = min(candidates, key=lambda place: mean[place])
            for cache in caches:
                del cache[victim]

    def _read_lender(self, layer: int, query: torch.Tensor, scaling: float) -> torch.Tensor:
        assert isinstance(self.eviction, SharedLayers)
        caches = self.layers[self.eviction.lenders[self.eviction.borrowers.index(layer)]]
        outputs = []
        for head, row in enumerate(query[0, :, 0].double().numpy()):
            cache = caches[head // (query.shape[1] // len(caches))]
            logits = np.array([token.key @ row * scaling for token in cache])
            weights = np.exp(logits - logits.max())
            outputs.append(sum(w * token.value for w, token in zip(weights / weights.sum(), cache, strict=True)))
        return torch.from_numpy(np.stack(outputs))[None, None].to(query.dtype)

    def _readable(self, layer: int, head: int, new: Token) -> Cache:
        if isinstance(self.eviction, SparseRead) and layer not in self.eviction.select_layers and self._selected:
            chosen = {token.order for token in self._selected[head]}
            return [token for token in self.layers[layer][head] if token.order in chosen]
        return self.layers[layer][head]

    def _select(self, layer: int) -> None:
        if isinstance(self.eviction, SparseRead) and layer in self.eviction.select_layers:
            self._selected = [
                [*sorted(cache[:-1], key=lambda token: -token.attention)[: self.eviction.top - 1], cache[-1]]
                for cache in self.layers[layer]
            ]


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / max(np.linalg.norm(one) * np.linalg.norm(other), 1e-24))


def heavy_hitters(numbers: HeavyHitters, cache: Cache) -> None:
    """H2O drops one per step."""
    if len(cache) > numbers.budget:
        candidates = cache[: len(cache) - numbers.recent]
        cache.remove(min(candidates, key=lambda token: token.score))


def shares(layers: int, *retention: str) -> tuple[Fraction, ...]:
    """One retention for all layers, or one of each."""
    return tuple(Fraction(retention[layer % len(retention)]) for layer in range(layers))
