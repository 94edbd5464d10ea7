"""A pass that a policy changes: who attends to what in each layer, and which tokens go on to the next ones."""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.rotation import Rotation
from prefill_worker.compression.sparse.prefill import SparsePrefill
from prefill_worker.compression.sparse.thinned import ThinnedAttention
from prefill_worker.compression.statistics import Statistic
from prefill_worker.engine.observer import PrefillObserver


class SparseObserver(PrefillObserver):
    """The observer of one sparse pass over a model `with_own_layers`; its arguments and attributes are the base's.

    Args:
        sparse: What the policy changes.

    Attributes:
        survivors: [num_tokens] bool, the tokens that reach the last layer; None while nothing was dropped.
        lenders: Of each layer that has borrowed, the one below whose keys and values it attended to.
    """

    def __init__(
        self,
        prompt: PromptShape,
        statistics: Collection[Statistic[Any]],
        cancelled: threading.Event,
        rotations: Sequence[Rotation],
        sparse: SparsePrefill,
    ) -> None:
        super().__init__(prompt, statistics, cancelled, rotations)
        self._sparse = sparse
        self._places: torch.Tensor | None = None
        # views of what the cache holds anyway
        self._read: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """See `LayerHook.attend`; batch is 1."""
        assert mask is None, "a sparse pass knows plain causal attention only"
        self._begin(layer)
        self._read.append((key[0], value[0]))
        if (lender := self._sparse.lender(layer)) is not None:
            self.lenders[layer], self._read[layer] = lender, self._read[lender]
        attention = self._layer(query[0], *self._read[layer], scaling)
        self._measure(attention)
        return self._sparse.attend(attention, self.measured[-1])[None].transpose(1, 2)

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Called before each decoder layer: its arguments without the dropped tokens; None leaves them."""
        if self._places is None and self.measured:
            self._places = self._sparse.survivors(len(self.measured), self.measured[-1])
            self.survivors = self._mask()
        if self._places is None:
            return None
        hidden, *others = args
        cos, sin = kwargs["position_embeddings"]
        thinned = {
            "position_embeddings": (self._thin(cos, -2), self._thin(sin, -2)),
            "position_ids": self._thin(kwargs["position_ids"], -1),
        }
        return (self._thin(hidden, 1), *others), {**kwargs, **thinned}

    def _layer(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        mask: torch.Tensor | None = None,
    ) -> LayerAttention:
        if self._places is None:
            return super()._layer(query, key, value, scaling)
        rotation = self._rotations[len(self.measured)]
        rotation = replace(rotation, positions=rotation.positions[..., self._places])
        return ThinnedAttention(
            prompt=self._prompt,
            query=query,
            key=key,
            value=value,
            scaling=scaling,
            rotation=rotation,
            places=self._places,
        )

    def _mask(self) -> torch.Tensor | None:
        if self._places is None:
            return None
        mask = torch.zeros(self._prompt.num_tokens, dtype=torch.bool, device=self._places.device)
        return mask.index_fill_(0, self._places, True)

    def _thin(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Hidden states of deeper layers come without the dropped tokens already."""
        assert self._places is not None
        return tensor if tensor.shape[dim] == len(self._places) else tensor.index_select(dim, self._places)


def with_own_layers(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights and modules, but decoder layers of its own that a `SparseObserver` may thin.

    Other threads may be in the model's layers (a combined worker decodes with them), so these get no hook.
    """
    layers = model.get_decoder().layers
    path = [module for module in model.modules() if any(part is layers for part in module.modules())]
    own = {id(module) for module in (*path, *layers)}
    shared = [*model.parameters(), *model.buffers(), *(part for part in model.modules() if id(part) not in own)]
    twin = copy.deepcopy(model, {id(part): part for part in shared})
    for layer in twin.get_decoder().layers:
        layer.register_forward_pre_hook(_enter, with_kwargs=True)
    return twin


def _enter(
    layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    return kwargs["vlc"].enter(args, kwargs)
