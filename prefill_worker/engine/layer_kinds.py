"""What differs between the layers of one model: how they rotate, and how far back they see."""

from __future__ import annotations

import inspect
from functools import partial

import torch
from transformers import PreTrainedModel

from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.rotation import Rotation
from prefill_worker.prompt import Prompt
from shared.model.support import layer_windows

VISUAL_TYPES = "token_type_ids"


class LayerKinds:
    """Read from a model's configuration once.

    Attributes:
        windows: Of each layer how many tokens a query sees, itself included; 0 for all.
        bidirectional: Whether tokens of one image see each other in both directions; the model must be told which
            these are.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        text = model.config.get_text_config()
        count = text.num_hidden_layers
        self.windows = layer_windows(text) or (0,) * count
        self.bidirectional = VISUAL_TYPES in inspect.signature(model.forward).parameters
        self._model = model
        self._rotary = model.get_decoder().rotary_emb
        by_type = "layer_type" in inspect.signature(self._rotary.forward).parameters
        self._types: list[str | None] = list(text.layer_types) if by_type else [None] * count
        # tells the rotary embedding in which precision and where to answer
        self._fp32 = torch.empty(0, device=model.device)

    @property
    def causal(self) -> bool:
        """Whether every query sees itself and all before it, and nothing else."""
        return not (any(self.windows) or self.bidirectional)

    def visual_types(self, prompt: PromptShape, piece: range) -> torch.Tensor:
        """What a `bidirectional` model must be told: [1, num_tokens] int64, 1 for visual tokens.

        The model reads them by position, so they begin with the prompt where one of the piece is visual.
        """
        first = 0 if prompt.visual[piece.start : piece.stop].any() else piece.start
        return prompt.visual[None, first : piece.stop].to(self._model.device, torch.long)

    def rotations(self, prompt: Prompt) -> list[Rotation]:
        """How each layer rotates the queries and keys of a prompt."""
        positions = prompt.rotary_positions.to(self._model.device)
        kinds = {
            kind: Rotation(angles=partial(self._angles, kind), positions=positions, next_position=prompt.next_position)
            for kind in dict.fromkeys(self._types)
        }
        return [kinds[kind] for kind in self._types]

    def _angles(self, kind: str | None, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # [1, n], or [3, 1, n]
        batch = positions.unsqueeze(-2)
        cos, sin = self._rotary(self._fp32, batch) if kind is None else self._rotary(self._fp32, batch, kind)
        return cos[0], sin[0]
