"""The wire stage: what lies in the arena, restored, is what was selected, or near it by the format's own measure."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import chain

import pytest
import torch

from prefill_worker.compression.key_channels import QUERIES
from prefill_worker.compression.pipeline import Selection
from prefill_worker.engine.engine import Prefilled
from prefill_worker.parcel.wire_stage import WrittenBody, write_kept
from prefill_worker.parcel.writer import kept_counts
from shared.kv.layout import KVLayout
from shared.model.kv_codec import decode
from shared.model.spec import TORCH_DTYPES
from shared.request.params import Wire
from tests.unit.prefill_worker.test_parcel_writer import expected, prefilled, selection

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=32, dtype="bfloat16")
TOKENS = 100
SELECTIONS = [
    selection([list(range(0, 100, 2)), list(range(40))], TOKENS),
    selection([[1, 5, 9], list(range(10, 95))], TOKENS),
]


@pytest.fixture
def source() -> Prefilled:
    squares = [{QUERIES: torch.rand(2, 32, generator=torch.Generator().manual_seed(layer))} for layer in range(2)]
    return replace(prefilled(LAYOUT, TOKENS), measured=squares)


def write(source: Prefilled, wire: Wire, selections: list[Selection] = SELECTIONS) -> WrittenBody:
    counts = kept_counts(source, selections)
    room = memoryview(bytearray(b"\xa5" * (LAYOUT.body_bytes(counts) + 64)))
    written = write_kept(source, selections, counts, LAYOUT, wire, room)
    written.arrival()
    assert bytes(room[len(written.body) :]) == b"\xa5" * (len(room) - len(written.body))
    return written


def plain(source: Prefilled, selections: list[Selection] = SELECTIONS) -> torch.Tensor:
    rows = torch.frombuffer(bytearray(expected(source, selections)), dtype=TORCH_DTYPES[LAYOUT.dtype])
    return rows.view(-1, LAYOUT.head_dim)


def restored(source: Prefilled, written: WrittenBody) -> torch.Tensor:
    assert written.encoding is not None
    rows = torch.full_like(plain(source), torch.nan)
    body = torch.frombuffer(written.body, dtype=torch.uint8)
    decode(body, LAYOUT, kept_counts(source, SELECTIONS), written.encoding, rows)
    return rows


def keys_and_values(rows: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    counts = (50, 40, 50, 40, 3, 85, 3, 85)
    parts = rows.split(counts)
    return [parts[0], parts[1], parts[4], parts[5]], [parts[2], parts[3], parts[6], parts[7]]


@pytest.mark.parametrize(("bits", "step"), [(8, 0.03), (4, 0.4), (2, 2.0)])
def test_quantised_values_come_back_within_half_a_step(source: Prefilled, bits: int, step: float) -> None:
    written = write(source, Wire(bits=bits, residual=8))
    assert len(written.body) < plain(source).numel() * 2 * 0.75
    error = (restored(source, written) - plain(source)).float().abs()
    assert 0 < error.max() < step


def test_the_recent_rows_are_as_they_were(source: Prefilled) -> None:
    back, wanted = restored(source, write(source, Wire(bits=2, key_channels=0.5, residual=10))), plain(source)
    for there, here in zip(chain(*keys_and_values(back)), chain(*keys_and_values(wanted)), strict=True):
        assert torch.equal(there[-10:], here[-10:])
        assert len(here) <= 10 or not torch.equal(there, here)


def test_fewer_channels_alone_change_nothing_else(source: Prefilled) -> None:
    back, wanted = restored(source, write(source, Wire(key_channels=0.6, residual=7))), plain(source)
    (keys, values), (whole_keys, whole_values) = keys_and_values(back), keys_and_values(wanted)
    for there, here in zip(values, whole_values, strict=True):
        assert torch.equal(there, here)
    for there, here in zip(keys, whole_keys, strict=True):
        older = max(0, len(here) - 7)
        dropped = (there[:older] == 0).all(dim=0)
        assert not older or dropped.sum() == 12
        assert torch.equal(there[:older][:, ~dropped], here[:older][:, ~dropped])


@pytest.mark.parametrize("wire", [Wire(), Wire(bits=4, residual=1000), Wire(key_channels=0.99)])
def test_off_or_useless_is_the_plain_body(source: Prefilled, wire: Wire) -> None:
    written = write(source, wire)
    assert written.encoding is None
    assert bytes(written.body) == expected(source, SELECTIONS)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -40_000.0])
def test_a_value_that_fp16_cannot_serve_makes_the_parcel_plain(
    source: Prefilled, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    source.keys[1][1, 50, 3] = value
    with caplog.at_level(logging.WARNING):
        written = write(source, Wire(bits=4, key_channels=0.6))
    assert written.encoding is None
    assert bytes(written.body) == expected(source, SELECTIONS)
    assert "travels plain" in caplog.text


def test_merged_rows_are_encoded_as_they_are_shipped(source: Prefilled) -> None:
    generator = torch.Generator().manual_seed(9)
    merged = tuple(torch.randn(90, 32, generator=generator).bfloat16() for _ in range(2))
    selections = [replace(SELECTIONS[0], merged=merged), SELECTIONS[1]]
    written = write(source, Wire(bits=8, residual=0), selections)
    back = restored(source, written)
    torch.testing.assert_close(back[:180].float(), torch.cat(merged).float(), atol=0.05, rtol=0.01)
