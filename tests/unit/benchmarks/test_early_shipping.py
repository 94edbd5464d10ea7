"""The early shipping benchmark: two processes, three variants, one parcel; and its slow link."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import pytest

from benchmarks.early_shipping import __main__ as early_shipping
from benchmarks.early_shipping.__main__ import EarlyShippingConfig, measure
from benchmarks.early_shipping.certain import certain_shares
from benchmarks.early_shipping.slow_link import SlowLink
from prefill_worker.parcel import early_rows
from shared.request.params import Budget
from tests.unit.benchmarks.tiny_models import FLAGS, SIZES

SMALL: dict[str, Any] = {**SIZES, "prompt": 90, "rows": 10, "rounds": 1, "warmup": 0, "prompts": 0}


@pytest.fixture(autouse=True)
def _every_row_is_a_wave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_rows, "MIN_WAVE_BYTES", 1)


def test_figures() -> None:
    found = measure(EarlyShippingConfig(**SMALL, policies=["snap_kv"], mbit=[0, 400], retention=0.5))
    kinds = [(made["policy"], made["mbit"], made["variant"]) for made in found["deliveries"]]
    assert kinds == [("snap_kv", mbit, variant) for mbit in (0, 400) for variant in ("held", "cascade", "early")]
    for made in found["deliveries"]:
        # fp32 keys and values of 3 layers with one head
        assert made["kv_bytes"] == 3 * 45 * 2 * 128 * 4
        assert made["total_ms"] >= max(made["pass_ms"], made["hand_over_ms"]) > 0
        assert made["pass_cpu_ms"] > 0
        # budgets are known at once, so that all layers but the last leave early
        early = made["variant"] == "early"
        assert made["early_share"] == pytest.approx(2 / 3 if early else 0)
        assert made["waves"] == (2 if early else 0)
    assert 0 < found["density"] <= 1
    assert found["bundled"] == []


def test_sharper_attention_is_sparser() -> None:
    flat, sharp = (
        measure(EarlyShippingConfig(**SMALL, policies=["vl_cache"], mbit=[0], sharpness=sharpness))["density"]
        for sharpness in (1.0, 40.0)
    )
    assert sharp < 0.5 < flat


def test_what_is_certain_of_real_prompts() -> None:
    vl_cache, snap_kv = certain_shares(["vl_cache", "snap_kv"], Budget(retention=0.1), prompts=1, threads=1)
    assert (snap_kv["half_way"], snap_kv["before_last"]) == (0.5, 1 - 1 / snap_kv["layers"])
    assert 0 < vl_cache["half_way"] < 0.5 < vl_cache["before_last"] < 1


def test_it_prints_a_table_and_one_json_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    flags = ["--prompt=90", "--rows=10", "--rounds=1", "--warmup=0", "--prompts=1", "--mbit", "0", "--json=-"]
    monkeypatch.setattr(sys, "argv", ["early_shipping", *FLAGS, *flags, "--policies", "vl_cache"])
    early_shipping.main()
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["workload"]["mbit"] == [0]
    assert [line.split()[1] for line in lines if line.startswith("| vl_cache")] == ["vl_cache"] * 4


@pytest.mark.parametrize("wrong", [{"rows": 90}, {"retention": 1.0}, {"mbit": [-1]}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must lie|speed"):
        EarlyShippingConfig(**{**SMALL, **wrong})


def test_a_slow_link_is_as_slow_as_it_says() -> None:
    nbytes, bytes_per_s = 1 << 20, 4 << 20

    async def main() -> float:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(str(len(await reader.read(-1))).encode())
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        link = SlowLink(server.sockets[0].getsockname()[1], bytes_per_s)
        host, port = (await link.start()).split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        started = time.monotonic()
        writer.write(bytes(nbytes))
        writer.write_eof()
        assert await reader.read(-1) == str(nbytes).encode()
        writer.close()
        await link.stop()
        server.close()
        await server.wait_closed()
        return time.monotonic() - started

    assert asyncio.run(asyncio.wait_for(main(), 20)) >= nbytes / bytes_per_s
