"""The full-attention pass over one prompt. Runs in the model thread; knows nothing of requests or transport."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from prefill_worker.compression.cascade import Cascade
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.sparse.prefill import SparsePrefill
from prefill_worker.compression.statistics import ObservedLayer, Statistic
from prefill_worker.engine.content_cache import ContentCache
from prefill_worker.engine.layer_kinds import VISUAL_TYPES, LayerKinds
from prefill_worker.engine.look_ahead import Draw, LookAhead
from prefill_worker.engine.memory import Memory
from prefill_worker.engine.observer import CascadeObserver, PrefillObserver
from prefill_worker.engine.pieces import cut
from prefill_worker.engine.prefix import Prefix
from prefill_worker.engine.prompt_cache import PromptCache
from prefill_worker.engine.sparse_pass import SparseObserver, with_own_layers
from prefill_worker.engine.vision import VisionEncoder
from prefill_worker.parcel.early_rows import EarlyRows
from prefill_worker.prompt import Prompt
from shared.errors import InvalidRequestError, RequestCancelledError


@dataclass(frozen=True, kw_only=True)
class Prefilled:
    """The outcome of one pass.

    Attributes:
        logits: [vocab] fp32, of the first generated token.
        keys: Per layer [num_kv_heads, num_tokens, head_dim], rotated; only of survivors where a sparse pass dropped
            the others; with those of the answer's first tokens behind them after looking ahead. After a cascade
            [rows, head_dim], head after head.
        values: As `keys`.
        measured: Per layer, each statistic's value; empty when nothing was observed.
        seconds: Duration of the stages vision_encode, prefill, statistics, and cascade where there was one.
        peak_kv_bytes: Most KV that there was during the pass.
        survivors: [num_tokens] bool, the tokens that reached the last layer of a sparse pass; None when all did.
        lenders: Of each layer that borrowed, the one below whose keys and values it attended to; they are its own here.
        ahead: Per layer what the answer's first tokens attended to, see `ObservedLayer`; empty without looking ahead.
        peaks: Per layer the largest of their weights, see `LookAhead`; as `ahead`.
        held: Per layer which tokens the rows of `keys` are, [num_kv_heads, num_tokens] bool; empty without a cascade.
        scored: The layers as the policy of the cascade saw and scored them; empty without one.
        known_images: Images of the prompt that an earlier one has shown, so that the vision tower was spared.
        known_tokens: Tokens of the prompt that an earlier one began with, so that the whole model was spared.
        early: What has left already; None where nothing could.
    """

    logits: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    measured: list[dict[Statistic[Any], Any]]
    seconds: dict[str, float]
    peak_kv_bytes: int = 0
    survivors: torch.Tensor | None = None
    lenders: Mapping[int, int] = field(default_factory=dict)
    ahead: Sequence[torch.Tensor | None] = ()
    peaks: Sequence[torch.Tensor] = ()
    held: Sequence[torch.Tensor] = ()
    scored: Sequence[ObservedLayer] = ()
    known_images: int = 0
    known_tokens: int = 0
    early: EarlyRows | None = None

    @property
    def has_full_kv(self) -> bool:
        """Whether the model could go on from here as from its own pass: of every layer each token's KV is there."""
        return self.survivors is None and not self.lenders

    def observed(self, prompt: PromptShape) -> list[ObservedLayer]:
        """The layers as a policy sees them: the prompt's tokens alone."""
        if self.scored:
            return list(self.scored)
        seen, ahead = slice(prompt.num_tokens), self.ahead or [None] * len(self.keys)
        return [
            ObservedLayer(
                prompt=prompt,
                key=key[:, seen],
                value=value[:, seen],
                measured=measured,
                lender=self.lenders.get(index),
                survivors=self.survivors,
                ahead=attention,
            )
            for index, (key, value, measured, attention) in enumerate(
                zip(self.keys, self.values, self.measured, ahead, strict=True)
            )
        ]


class PrefillEngine:
    """Runs prompts one at a time: a CPU gains nothing from batching prefills, and nothing is padded.

    Args:
        vision_cache_bytes: Features of images that may be kept for later prompts, on the model's device.
        prefix_cache_bytes: KV of prompts up to their last image that may be kept there, too.
        chunk_tokens: Longer prompts pass in pieces of so many tokens; 0 lets every prompt pass at once. So do those
            whose policy changes the pass, or gives KV up layer by layer: a layer needs all of its tokens then.

    Attributes:
        prefixes: The KV that is kept.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        vision_cache_bytes: int = 0,
        prefix_cache_bytes: int = 0,
        chunk_tokens: int = 0,
    ) -> None:
        self._model = model
        self._chunk_tokens = chunk_tokens
        self.prefixes: ContentCache[Prefix] = ContentCache(prefix_cache_bytes)
        self._vision = VisionEncoder(model, vision_cache_bytes)
        self._memory = Memory(self.features, self.prefixes)
        self._kinds = LayerKinds(model)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._model.device

    @property
    def features(self) -> ContentCache[torch.Tensor]:
        """Features of images that are kept."""
        return self._vision.cache

    @torch.inference_mode()
    def prefill(
        self,
        prompt: Prompt,
        statistics: Collection[Statistic[Any]],
        cancelled: threading.Event,
        sparse: SparsePrefill | None = None,
        cascade: Cascade | None = None,
        early: EarlyRows | None = None,
    ) -> Prefilled:
        """One pass.

        Args:
            prompt: One unpadded prompt.
            statistics: What is measured in each layer; none at retention 1.
            cancelled: Checked at the start, before every image and before every layer of each piece.
            sparse: What a policy changes in the pass.
            cascade: Begins the selection of the one policy that the pass is for; a fresh one, and not with `sparse`.
            early: Takes what that cascade is certain to keep.

        Raises:
            RequestCancelledError: `cancelled` was set.
            InvalidRequestError: A sparse pass that the model does not allow.
        """
        if cancelled.is_set():
            # while it waited in the queue
            raise RequestCancelledError("cancelled before it began")
        if sparse is not None:
            self._check_sparse()
        started = time.monotonic()
        recalled = self._memory.recall(prompt, statistics, sparse=sparse is not None)
        known_tokens = recalled.prefix.num_tokens if recalled.prefix else 0
        pieces = self._pieces(prompt, known_tokens, at_once=bool(sparse or cascade))
        rest = prompt.shape.num_tokens - pieces[0].stop
        # sliding layers, too, keep every token until the selection
        cache = PromptCache(cascade, recalled.prefix, rest=rest, kept_tokens=recalled.kept_tokens, early=early)
        observer = self._observer(prompt, statistics, cancelled, sparse, cache.passed if cascade else None)
        features, known_images = self._features(prompt, known_tokens, recalled.image_keys, cancelled)
        model = self._model if sparse is None else self._sparse_model
        for piece in pieces:
            logits = self._pass(model, prompt, piece, features, cache, observer)
        self._memory.keep(recalled, cache.begins)
        return replace(
            _prefilled(logits, cache, observer),
            seconds=_stage_seconds(started, observer),
            scored=cascade.layers if cascade else (),
            known_images=known_images,
            known_tokens=known_tokens,
            early=early,
        )

    def look_ahead(self, prefilled: Prefilled, token: int, position: int, steps: int, draw: Draw) -> Prefilled:
        """Decodes the answer's first tokens over the full KV of a pass, which stays as it is.

        Args:
            prefilled: A pass with full KV.
            token: The first of them, at `position`.
            steps: Tokens that are fed at most.

        Returns:
            The pass with the KV of what was fed, and what it attended to.
        """
        assert prefilled.has_full_kv, "a sparse pass has no full KV"
        ahead = LookAhead(self._model, self._kinds.windows, prefilled.keys, prefilled.values, steps)
        ahead.run(token, position, steps, draw)
        return replace(prefilled, keys=ahead.keys(), values=ahead.values(), ahead=ahead.attention, peaks=ahead.peaks)

    def _observer(
        self,
        prompt: Prompt,
        statistics: Collection[Statistic[Any]],
        cancelled: threading.Event,
        sparse: SparsePrefill | None,
        passed: Callable[[ObservedLayer], None] | None,
    ) -> PrefillObserver:
        """What attends in the pass and measures it; `passed` takes each layer of a cascade."""
        rotations, causal = self._kinds.rotations(prompt), self._kinds.causal
        if sparse is not None:
            assert passed is None, "a layer of a sparse pass has not all tokens"
            return SparseObserver(prompt.shape, statistics, cancelled, rotations, sparse)
        if passed is not None:
            return CascadeObserver(prompt.shape, statistics, cancelled, rotations, passed, causal=causal)
        return PrefillObserver(prompt.shape, statistics, cancelled, rotations, causal=causal)

    def _pieces(self, prompt: Prompt, first: int, *, at_once: bool) -> list[range]:
        """The tokens that pass, from `first` on."""
        most = 0 if at_once else self._chunk_tokens
        return cut(prompt.shape, first, most, whole_images=self._kinds.bidirectional)

    def _pass(
        self,
        model: PreTrainedModel,
        prompt: Prompt,
        piece: range,
        features: torch.Tensor | None,
        cache: PromptCache,
        observer: PrefillObserver,
    ) -> torch.Tensor:
        """The logits [vocab] fp32 behind a piece, which follows what the cache has."""
        inputs = self._vision.inputs(prompt, piece, features)
        if self._kinds.bidirectional:
            inputs[VISUAL_TYPES] = self._kinds.visual_types(prompt.shape, piece)
        output = model(
            **inputs,
            position_ids=prompt.position_ids[..., piece.start : piece.stop].to(self.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            vlc=observer,
        )
        return output.logits[0, -1].float()

    def _features(
        self, prompt: Prompt, first: int, image_keys: Sequence[bytes], cancelled: threading.Event
    ) -> tuple[torch.Tensor | None, int]:
        """What the tokens from `first` on read of images, and how many of these the vision tower was spared."""
        if first:
            return None, len(image_keys)
        return self._vision.encode(prompt, image_keys, cancelled)

    def _check_sparse(self) -> None:
        why = None
        if self._vision.deepstack:
            why = "its deeper layers read of images, too, and expect every token of them"
        elif not self._kinds.causal:
            why = "not every token of it sees all before it and nothing else"
        if why:
            raise InvalidRequestError(
                f"the policy changes the pass, which this model does not allow: {why}", reason="POLICY_MODEL"
            )

    @cached_property
    def _sparse_model(self) -> PreTrainedModel:
        return with_own_layers(self._model)


def _prefilled(logits: torch.Tensor, cache: PromptCache, observer: PrefillObserver) -> Prefilled:
    # what a borrowing layer had of its own is let go
    read = [observer.lenders.get(layer, layer) for layer in range(len(cache.keys))]
    return Prefilled(
        logits=logits,
        keys=[cache.keys[layer] for layer in read],
        values=[cache.values[layer] for layer in read],
        measured=observer.measured,
        seconds={},
        peak_kv_bytes=cache.peak_bytes,
        survivors=observer.survivors,
        lenders=observer.lenders,
        held=cache.held,
    )


def _stage_seconds(started: float, observer: PrefillObserver) -> dict[str, float]:
    now = time.monotonic()
    first_layer = observer.first_layer_at or now
    cascade = {"cascade": observer.seconds_after} if isinstance(observer, CascadeObserver) else {}
    return {
        "vision_encode": first_layer - started,
        "prefill": now - first_layer - observer.seconds - sum(cascade.values()),
        "statistics": observer.seconds,
        **cascade,
    }
