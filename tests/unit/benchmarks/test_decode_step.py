"""The decode benchmark: same weights for all, the lengths it claims, and figures that follow from the times."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import decode_step
from benchmarks.decode_step import DecodeStepConfig, evaluate, measure
from benchmarks.random_kv import (
    RandomBlockPool,
    build_engine,
    build_pool,
    even,
    install,
    pool_bytes,
    ragged,
    random_body,
)
from benchmarks.random_llama import ModelConfig, baseline_attention, build_model, device_facts, twin, weight_bytes
from benchmarks.shapes import SHAPES, ShapeName
from benchmarks.stopwatch import WARM_UPS
from decode_worker.graph_engine import GraphEngine
from shared.kv.layout import KVLayout
from shared.model.attention import DECODE_ATTENTION
from tests.unit.benchmarks.tiny_models import FLAGS, SIZES, cpu_path, gpu_path

SMALL: dict[str, Any] = {**SIZES, "batch": 2, "prompt": 40, "rounds": 2}
VARIANTS = ["ours_full", "ours_kept", "no_kv", "hf_dynamic", "hf_static"]


@pytest.mark.parametrize("path", [cpu_path, gpu_path])
def test_all_variants_step_on_either_path(path: Any) -> None:
    config = path(DecodeStepConfig)(**SMALL)
    found = measure(config)
    assert list(found["percentiles_ms"]) == VARIANTS
    assert all(found[f"{name}_ms"] > 0 for name in VARIANTS)
    assert found["ratio"] == pytest.approx(found["ours_full_ms"] / found["ours_kept_ms"])
    # 3 layers, K and V, one head of 128 in fp32
    assert found["full_kv_bytes"] == 2 * 40 * 3 * 2 * 128 * 4
    assert (found["device"], found["hf_attention"]) == ("cpu", "sdpa")


@pytest.mark.gpu
def test_all_variants_step_on_a_gpu() -> None:
    found = measure(DecodeStepConfig(**{**SMALL, "dtype": "bfloat16"}, device="cuda"))
    assert list(found["percentiles_ms"]) == VARIANTS
    assert found["device"] == torch.cuda.get_device_name()


def test_figures_follow_from_times_and_bytes() -> None:
    times = dict(zip(VARIANTS, ([40.0, 20.0, 30.0], [10.0] * 3, [8.0] * 3, [90.0] * 3, [70.0] * 3), strict=True))
    found = evaluate(times, weights=1000, kv=9000)
    assert (found["ours_full_ms"], found["hf_static_ms"]) == (30.0, 70.0)
    assert found["ratio"] == 3.0
    assert found["roofline_ratio"] == pytest.approx(10_000 / 1900)
    assert found["ratio_over_roofline"] == pytest.approx(3.0 * 1900 / 10_000)
    assert found["hf_ratio"] == 9.0
    assert found["kept_over_no_kv"] == 1.25
    assert found["floor_gb_per_s"] == pytest.approx(10_000 / 0.030 / 1e9)
    assert found["percentiles_ms"]["ours_full"] == {"p5": 21.0, "p50": 30.0, "p95": 39.0}


def test_it_prints_a_table_and_one_json_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["decode_step", *FLAGS, "--batch=1", "--prompt=20", "--rounds=2", "--json=-"])
    decode_step.main()
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["benchmark"] == "decode_step"
    assert found["workload"]["batch"] == 1
    assert [line.split()[1] for line in lines if line.startswith("|")][2:] == VARIANTS


def test_the_report_names_the_sizes_of_the_shape() -> None:
    workload = DecodeStepConfig(shape="qwen2.5-vl-7b", layers=1, json="-").workload
    assert (workload["layers"], workload["hidden"], workload["shape"]) == (28, 3584, "qwen2.5-vl-7b")
    assert "json" not in workload


PARAMETERS: dict[ShapeName, float] = {"llava-1.5-7b": 6.74e9, "llava-1.6-mistral-7b": 7.24e9, "qwen2.5-vl-7b": 7.62e9}
TOKEN_KIB: dict[ShapeName, int] = {"llava-1.5-7b": 512, "llava-1.6-mistral-7b": 128, "qwen2.5-vl-7b": 56}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_as_large_as_the_models(shape: ShapeName) -> None:
    config = ModelConfig(shape=shape, device="meta")  # type: ignore[arg-type]
    model = build_model(config, positions=100)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == pytest.approx(PARAMETERS[shape], rel=0.002)
    embedding = config.text.vocabulary * config.text.hidden
    assert weight_bytes(model) == 2 * (parameters - embedding)
    assert config.layout.token_bytes == TOKEN_KIB[shape] << 10


def test_a_twin_shares_weights_but_not_attention() -> None:
    model = build_model(ModelConfig(**SIZES), positions=50)
    other = twin(model, "sdpa")
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert all(theirs[name].data_ptr() == mine[name].data_ptr() for name in mine)
    assert model.config._attn_implementation == DECODE_ATTENTION
    assert other.model.layers[0].self_attn.config._attn_implementation == "sdpa"
    assert model.dtype is torch.float32


LAYOUTS = st.builds(
    KVLayout,
    num_layers=st.integers(1, 40),
    num_kv_heads=st.integers(1, 4),
    head_dim=st.just(8),
    dtype=st.just("float32"),
)


@given(LAYOUTS, st.integers(3, 300), st.fractions(min_value=Fraction(1, 50), max_value=1), st.integers(0, 99))
def test_ragged_counts_have_exactly_their_mean(layout: KVLayout, prompt: int, share: Fraction, seed: int) -> None:
    mean = max(Fraction(3), share * prompt)
    kept = ragged(layout, prompt, mean, Random(seed))
    per_layer = kept[:: layout.num_kv_heads]
    assert even(layout, per_layer) == kept
    assert len(per_layer) == layout.num_layers
    assert sum(per_layer) == int(mean * layout.num_layers)
    assert all(1 <= count <= prompt for count in per_layer)


def test_ragged_counts_differ_and_are_never_zero() -> None:
    layout = KVLayout(num_layers=8, num_kv_heads=1, head_dim=8, dtype="float32")
    assert len(set(ragged(layout, 100, Fraction(50), Random(0)))) > 4
    assert ragged(layout, 100, Fraction(1, 8), Random(0)) == (1,) * 8


@pytest.mark.parametrize("path", [cpu_path, gpu_path])
def test_a_pool_holds_exactly_its_sequences(path: Any) -> None:
    config = path(ModelConfig)(**SIZES)
    num_kept = (5, 16, 33)
    pool = build_pool(config, pool_bytes(config, num_kept, 7, 3), max_num_seqs=3, max_tokens=60)
    for _ in range(3):
        pool.allocate(pool.sequence_bytes(num_kept, 7))
    assert pool.capacity - pool.used_bytes < pool.sequence_bytes(num_kept, 7)
    pool.check_integrity()


def test_random_blocks_are_dealt_and_read() -> None:
    """Two sequences with the same tokens differ by their KV alone: were it zeros, their logits would be equal."""
    config = gpu_path(ModelConfig)(**SIZES)
    num_kept, growth = (5, 16, 33), WARM_UPS
    pool = build_pool(config, pool_bytes(config, num_kept, growth, 2), max_num_seqs=2, max_tokens=60)
    assert isinstance(pool, RandomBlockPool)
    model = build_model(config, positions=60)
    engine = build_engine(model, pool, max_num_seqs=2)
    assert isinstance(engine, GraphEngine)
    batch = [
        install(
            pool,
            pool.allocate(pool.sequence_bytes(num_kept, growth)),
            num_kept,
            random_body(config, 33),
            position=40,
            growth=growth,
        )
        for _ in range(2)
    ]
    pool.check_integrity()
    for sequence in batch:
        assert sequence.kv.lengths.ravel().tolist() == [5, 16, 33]
    keys = [pool.export(sequence.kv).body for sequence in batch]
    assert len(keys[0]) == config.layout.body_bytes(num_kept)
    assert keys[0] != keys[1]
    engine.step(batch)
    assert [sequence.kv.appended for sequence in batch] == [1, 1]


def test_the_baseline_has_flash_attention_only_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.random_llama.is_flash_attn_2_available", lambda: True)
    assert baseline_attention(gpu_path(ModelConfig)()) == "flash_attention_2"
    assert baseline_attention(ModelConfig()) == "sdpa"
    monkeypatch.setattr("benchmarks.random_llama.is_flash_attn_2_available", lambda: False)
    assert baseline_attention(gpu_path(ModelConfig)()) == "sdpa"


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert device_facts(ModelConfig(device="cuda"))["device"] == "a GPU"
    assert device_facts(ModelConfig()) == {"device": "cpu"}
