"""The wire benchmark: its figures fit together and its bytes are those of the format."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from benchmarks import wire
from benchmarks.wire import RandomParcel, WireConfig, measure
from shared.kv.encoding import Encoding
from shared.request.params import Wire

SMALL: dict[str, Any] = {"kept": 12, "residual": 0, "group": 8, "bits": (4, 0), "rounds": 2, "retentions": (1.0,)}


def test_figures() -> None:
    config = WireConfig(**SMALL)
    found = measure(config)
    assert [(row["bits"], row["key_channels"]) for row in found["codec"]] == [(4, 1.0), (4, 0.6), (0, 0.6)]
    encoding = Encoding(bits=4, group=8, residual=0, key_channels=128)
    wire_bytes = encoding.body_bytes(config.layout, (12,) * 112)
    for row in found["codec"]:
        took = row["encode_ms_per_mib"] + row["restore_ms_per_mib"]
        assert row["pays_below_mb_per_s"] == pytest.approx((1 - row["wire_share"]) * 2**20 / 1000 / took)
    assert found["codec"][0]["wire_share"] == wire_bytes / config.layout.full_bytes(12)
    assert [row["plain_bytes"] > row["wire_bytes"] for row in found["prompt"]] == [True] * 3


def test_a_wire_that_saves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="saves nothing"):
        RandomParcel(WireConfig(kept=12)).steps(Wire(bits=4))


def test_it_prints_tables_and_one_json_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    flags = "--kept 12 --residual 0 --bits 4 --key-channels 1 --retentions 1 --rounds 2 --json -"
    monkeypatch.setattr(sys, "argv", ["wire", *flags.split()])
    wire.main()
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    assert (figures["benchmark"], len(figures["codec"]), len(figures["prompt"])) == ("wire", 1, 1)
    assert sum(line.startswith("| 4 | 100%") for line in lines) == 2
