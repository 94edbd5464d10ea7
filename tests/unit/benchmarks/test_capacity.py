"""The capacity benchmark: counts are what admission arithmetic says, and everything goes back to the pool."""

from __future__ import annotations

import json
import sys
from random import Random
from typing import Any

import pytest
import torch

from benchmarks import capacity
from benchmarks.capacity import PROMISES, CapacityConfig, measure, throughput
from benchmarks.random_kv import build_pool, random_body
from benchmarks.tenants import Tenants
from decode_worker.kv_pool.base import KVPool
from shared.request.params import Budget
from shared.rpc.options import MIB
from tests.unit.benchmarks.tiny_models import FLAGS, SIZES, cpu_path, gpu_path

PROMPT, NEW, GROWTH = 100, 6, 5
SMALL: dict[str, Any] = {**SIZES, "kv_memory_mib": 2, "prompt": PROMPT, "new_tokens": NEW, "churn": 6}
# 3 layers, K and V, one head of 128 in fp32
TOKEN_BYTES = 3 * 2 * 128 * 4


def tenants_of(path: Any, retention: float) -> Tenants:
    config = path(CapacityConfig)(**SMALL)
    pool = build_pool(config, 2 * MIB, max_num_seqs=200, max_tokens=2 * PROMPT)
    return Tenants(pool, Budget(retention=retention), body=random_body(config, 2 * PROMPT), chance=Random(3))


def counted(pool: KVPool[Any, Any], bound: int, exact: int) -> int:
    """Sequences that fit when each needs `bound` bytes free to get in and then holds `exact`."""
    return max(0, (pool.capacity - bound) // exact + 1)


@pytest.mark.parametrize("growth", [1, GROWTH, 40])
@pytest.mark.parametrize(("retention", "kept"), [(1.0, PROMPT), (0.1, 10), (0.29, 29)])
def test_as_many_fit_as_the_bytes_say(retention: float, kept: int, growth: int) -> None:
    tenants = tenants_of(cpu_path, retention)
    tenants.fill(PROMPT, growth)
    bound = Budget(retention=retention).kept_tokens_bound(0, PROMPT)
    expected = counted(tenants.pool, (bound + growth) * TOKEN_BYTES, (kept + growth) * TOKEN_BYTES)
    assert len(tenants.sequences()) == expected
    assert tenants.occupancy().sequences == expected
    assert tenants.occupancy().used_over_needed == pytest.approx(1.0)
    assert tenants.occupancy().used_share == pytest.approx(expected * (kept + growth) * TOKEN_BYTES / (2 * MIB))


def test_blocks_cost_the_ends_of_their_rows() -> None:
    tenants = tenants_of(gpu_path, 1.0)
    tenants.fill(PROMPT, GROWTH)
    # 105 tokens are 7 blocks of 16
    assert len(tenants.sequences()) == tenants.pool.capacity // (7 * 16 * TOKEN_BYTES)
    assert tenants.occupancy().used_over_needed == pytest.approx(112 / 105)
    assert tenants.occupancy().fragmentation == 0.0


@pytest.mark.parametrize("path", [cpu_path, gpu_path])
@pytest.mark.parametrize("retention", [1.0, 0.1])
def test_sequences_come_and_go_without_losing_memory(path: Any, retention: float) -> None:
    tenants = tenants_of(path, retention)
    tenants.fill(PROMPT, GROWTH)
    before = tenants.sequences()
    lengths = set()
    for _ in range(20):
        tenants.end_one()
        tenants.fill(PROMPT, GROWTH, spread=0.5)
        tenants.check_integrity()
        assert 0 < tenants.occupancy().used_share <= 1
        assert 0 <= tenants.occupancy().fragmentation < 1
        lengths |= {sequence.next_position for sequence in tenants.sequences()}
    assert len(set(tenants.sequences()) - set(before)) > 3
    assert min(lengths) >= PROMPT // 2
    assert max(lengths) <= PROMPT * 3 // 2
    assert len(lengths) > 3
    tenants.end_all()
    tenants.check_integrity()
    assert tenants.sequences() == []
    assert tenants.pool.used_bytes == 0


@pytest.mark.parametrize("path", [cpu_path, gpu_path])
def test_the_full_pool_steps_on_either_path(path: Any) -> None:
    found = measure(path(CapacityConfig)(**SMALL))
    full, kept = found["sequences_1.0"], found["sequences_0.1"]
    assert found["sequences_ratio"] == kept / full > 3
    by_promise = list(found["sequences_ratio_by_promise"].values())
    assert by_promise == sorted(by_promise)
    assert len(by_promise) == len(PROMISES)
    assert found["bytes_per_sequence_ratio"] > 3
    assert found["tokens_per_s_0.1"] == pytest.approx(kept / found["step_ms_0.1"] * 1000)
    assert found["throughput_ratio"] == pytest.approx(found["tokens_per_s_0.1"] / found["tokens_per_s_1.0"])
    for retention in ("1.0", "0.1"):
        assert found[f"sequences_after_churn_{retention}"] > 0
        assert 0 <= found[f"fragmentation_after_churn_{retention}"] < 1


@pytest.mark.gpu
def test_the_full_pool_steps_on_a_gpu() -> None:
    found = measure(CapacityConfig(**{**SMALL, "dtype": "bfloat16"}, device="cuda"))
    assert found["device"] == torch.cuda.get_device_name()
    assert found["throughput_ratio"] > 0


@pytest.mark.parametrize("path", [cpu_path, gpu_path])
def test_every_sequence_takes_part_in_every_step(path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last measured step leaves each one without room, so the mean KV was that of a whole answer."""
    seen: list[Tenants] = []
    monkeypatch.setattr(capacity, "_churned", lambda config, tenants: seen.append(tenants) or tenants.occupancy())
    monkeypatch.setattr(capacity, "_ratio_at", lambda held, config, promise: 0.0)
    measure(path(CapacityConfig)(**SMALL))
    assert [len(tenants.sequences()) > 5 for tenants in seen] == [True, True]
    for tenants in seen:
        assert all(sequence.kv.full for sequence in tenants.sequences())
        assert {sequence.next_position for sequence in tenants.sequences()} == {PROMPT + GROWTH}


def test_throughput_follows_from_times_and_bytes() -> None:
    found = throughput({1.0: 10, 0.1: 80}, {1.0: [100.0, 50.0, 200.0], 0.1: [160.0] * 3}, weights=1000, kv=500)
    assert (found["tokens_per_s_1.0"], found["tokens_per_s_0.1"]) == (100.0, 500.0)
    assert found["throughput_ratio"] == 5.0
    assert found["roofline_throughput_ratio"] == pytest.approx(80 * (1000 + 10 * 500) / (10 * (1000 + 80 * 50)))
    assert found["throughput_ratio_over_roofline"] == pytest.approx(5.0 / 9.6)


def test_it_prints_tables_and_one_json_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    flags = ["--kv-memory-mib=1", "--prompt=60", "--new-tokens=6", "--churn=3", "--json=-"]
    monkeypatch.setattr(sys, "argv", ["capacity", *FLAGS, *flags])
    capacity.main()
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["workload"]["new_tokens"] == 6
    assert len([line for line in lines if line.startswith("| filled once")]) == 2
    assert any(line.startswith("throughput at equal KV memory") for line in lines)


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="new_tokens must be at least 5"):
        CapacityConfig(new_tokens=4)
