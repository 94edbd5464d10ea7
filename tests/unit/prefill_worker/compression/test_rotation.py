"""Rotations taken off and averaged, against complex numbers and against the queries of a model before it rotates."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.rotation import Rotation
from prefill_worker.compression.statistics import Statistic
from prefill_worker.engine.engine import PrefillEngine
from prefill_worker.prompt import PromptBuilder
from tests.unit.decode_worker.tiny import HEAD_DIM, LAYERS, QUERY_HEADS
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture, user

HALF = 4
FREQUENCIES = torch.tensor([1.0, 0.3, 0.1, 0.01])


def angles_scaled_by(scale: float) -> Any:
    def angles(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        turned = (positions[:, None] * FREQUENCIES).repeat(1, 2)
        return turned.cos() * scale, turned.sin() * scale

    return angles


def turned(vectors: torch.Tensor, position: float) -> torch.Tensor:
    """Pairs (i, i + half) as complex numbers; [n, 2 * half] float64."""
    pairs = torch.complex(vectors[:, :HALF].double(), vectors[:, HALF:].double())
    pairs = pairs * torch.polar(torch.ones(HALF).double(), position * FREQUENCIES.double())
    return torch.cat((pairs.real, pairs.imag), dim=1)


@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_undo_takes_the_rotation_off(scale: float) -> None:
    vectors = torch.randn(2, 5, 2 * HALF, generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([0, 1, 7, 8, 300])
    rotated = torch.stack([turned(vectors[:, at], float(p)) * scale for at, p in enumerate(positions)], dim=1)
    rotation = Rotation(angles=angles_scaled_by(scale), positions=positions, next_position=301)
    torch.testing.assert_close(rotation.undo(rotated), vectors, rtol=1e-4, atol=1e-4)


def test_the_mean_rotation_is_the_mean_of_rotated_vectors() -> None:
    vectors = torch.randn(3, 2 * HALF, generator=torch.Generator().manual_seed(2))
    rotation = Rotation(angles=angles_scaled_by(1.0), positions=torch.arange(9), next_position=9)
    expected = sum(turned(vectors, float(position)) for position in range(9, 9 + 20)) / 20
    torch.testing.assert_close(vectors @ rotation.mean_of_next(20).mT, expected.float(), rtol=1e-4, atol=1e-5)


@dataclass(frozen=True)
class PlainQueries(Statistic[torch.Tensor]):
    def measure(self, layer: LayerAttention) -> torch.Tensor:
        assert layer.rotation is not None
        return layer.rotation.undo(layer.query)


def test_the_engine_knows_its_models_rotation(engine: PrefillEngine, builder: PromptBuilder) -> None:
    prompt = builder.build([user(encoded(picture(1)), QUESTION)], max_new_tokens=1)
    seen: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda _, __, output: seen.append(output[0]))
        for layer in engine._model.get_decoder().layers
    ]
    prefilled = engine.prefill(prompt, [PlainQueries()], threading.Event())
    for hook in hooks:
        hook.remove()
    assert len(seen) == LAYERS
    for measured, projected in zip(prefilled.measured, seen, strict=True):
        expected = projected.view(-1, QUERY_HEADS, HEAD_DIM).transpose(0, 1)
        torch.testing.assert_close(measured[PlainQueries()], expected, rtol=1e-4, atol=1e-4)
