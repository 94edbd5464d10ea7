"""ThinK's channels against loops over plain lists."""

from __future__ import annotations

import pytest
import torch

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.key_channels import LAST_QUERIES, QUERIES, QuerySquares, sent_channels, wire_statistics
from prefill_worker.compression.statistics import measure_all
from prefill_worker.engine.engine import Prefilled
from shared.kv.layout import KVLayout
from shared.request.params import Wire
from tests.unit.prefill_worker.compression.observing import prompt_shape, random_attention


def query_square(layer: LayerAttention, head: int, channel: int) -> float:
    last = range(max(0, layer.prompt.num_tokens - LAST_QUERIES), layer.prompt.num_tokens)
    queries = range(head * layer.group, (head + 1) * layer.group)
    squares = [float(layer.query[query, row, channel]) ** 2 for query in queries for row in last]
    return sum(squares) / len(squares)


def twin(layer: LayerAttention, head: int, kept: list[int], number: int) -> list[int]:
    """The channels that are sent of a head which keeps the tokens `kept`."""
    worth = []
    for channel in range(layer.key.shape[2]):
        keys = [float(layer.key[head, token, channel]) ** 2 for token in kept]
        worth.append(query_square(layer, head, channel) * sum(keys) / len(keys))
    order = sorted(range(len(worth)), key=lambda channel: (-worth[channel], channel))
    return sorted(order[:number])


@pytest.mark.parametrize("tokens", [1, 5, 31, 32, 33, 90])
def test_the_last_queries_are_averaged_over_rows_and_group(tokens: int) -> None:
    layer = random_attention(prompt_shape(tokens), seed=tokens, num_kv_heads=2, group=3)
    found = QUERIES.measure(layer)
    wanted = [[query_square(layer, head, channel) for channel in range(8)] for head in range(2)]
    torch.testing.assert_close(found, torch.tensor(wanted))


def observed(num_layers: int, tokens: int, dtype: torch.dtype) -> tuple[list[LayerAttention], Prefilled]:
    layers = [random_attention(prompt_shape(tokens), seed=seed, group=2) for seed in range(num_layers)]
    for layer in layers:
        layer.key *= torch.rand(8, generator=torch.Generator().manual_seed(3))
        layer.key, layer.query = layer.key.to(dtype), layer.query.to(dtype)
    prefilled = Prefilled(
        logits=torch.zeros(1),
        keys=[layer.key for layer in layers],
        values=[layer.value for layer in layers],
        measured=[measure_all([QUERIES], layer) for layer in layers],
        seconds={},
    )
    return layers, prefilled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [1, 5, 8])
def test_the_channels_of_most_worth_are_sent(number: int, dtype: torch.dtype) -> None:
    layers, prefilled = observed(3, 40, dtype)
    kept = [[list(range(0, 40, 2 + layer + head)) for head in range(2)] for layer in range(3)]
    parts = [(part, kept[at]) for at, layer in enumerate(layers) for part in (layer.key, layer.value.to(dtype))]
    rows = torch.cat([part[head][tokens[head]] for part, tokens in parts for head in range(2)])
    layout = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, dtype=str(dtype).removeprefix("torch."))
    counts = [len(tokens) for heads in kept for tokens in heads]
    found = sent_channels(prefilled, rows, layout, counts, number)
    for at, layer in enumerate(layers):
        for head in range(2):
            assert found[at, head].nonzero().flatten().tolist() == twin(layer, head, kept[at][head], number)


def test_ties_go_to_the_lower_channel() -> None:
    _, prefilled = observed(1, 4, torch.float32)
    prefilled.measured[0][QUERIES] = torch.ones(2, 8)
    layout = KVLayout(num_layers=1, num_kv_heads=2, head_dim=8, dtype="float32")
    found = sent_channels(prefilled, torch.ones(16, 8), layout, [4, 4], 3)
    assert found[0].tolist() == [[True] * 3 + [False] * 5] * 2


def test_only_a_wire_with_fewer_channels_observes() -> None:
    assert wire_statistics(Wire(bits=4)) == ()
    assert wire_statistics(Wire(key_channels=0.6)) == (QuerySquares(32),)
