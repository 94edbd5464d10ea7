"""Both halves of the comparison with kvpress; presses are stand-ins, kvpress lives in an environment of its own."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks import kept_sets
from benchmarks.kept_sets import KV_HEADS, LAYERS, POLICIES, KeptSetsConfig
from shared.model.attention import PREFILL_ATTENTION


class LastTokensPress:
    """Leaves the last tokens of each layer, latest first."""

    def __init__(self, compression_ratio: float, **parameters: Any) -> None:
        self.kept, self.parameters = 1 - compression_ratio, parameters

    @contextlib.contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        def shorten(_: Any, __: Any, kwargs: dict[str, Any], output: Any) -> Any:
            for layer in kwargs["past_key_values"].layers:
                layer.keys = layer.keys[:, :, -round(layer.keys.shape[2] * self.kept) :].flip(2)
            return output

        hook = model.model.register_forward_hook(shorten, with_kwargs=True)
        yield
        hook.remove()


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    names = ("SnapKVPress", "PyramidKVPress", "ExpectedAttentionPress", "StreamingLLMPress")
    standin = ModuleType("kvpress")
    for name in names:
        setattr(standin, name, type(name, (LastTokensPress,), {}))
    monkeypatch.setitem(sys.modules, "kvpress", standin)
    yield importlib.import_module("benchmarks.compare_kvpress")
    del sys.modules["benchmarks.compare_kvpress"]


def test_our_half_keeps_the_budget_of_the_same_prompt_every_time(tmp_path: Path) -> None:
    config = KeptSetsConfig(folder=tmp_path, prompt=120)
    kept_sets.save_model(config, tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=PREFILL_ATTENTION).eval()
    prompt = kept_sets.random_prompt(config)
    assert torch.equal(prompt.inputs["input_ids"], kept_sets.random_prompt(config).inputs["input_ids"])
    for policy in POLICIES:
        layers = kept_sets.observed_layers(model, prompt, policy)
        kept, ranked = kept_sets.kept_positions(policy, layers, 0.5), kept_sets.ranked_positions(policy, layers)
        assert [len(layer) for layer in kept] == [KV_HEADS] * LAYERS
        assert sum(len(head) for layer in kept for head in layer) == 60 * KV_HEADS * LAYERS
        for layer, order in zip(kept, ranked, strict=True):
            assert layer == [sorted(best[: len(head)]) for head, best in zip(layer, order, strict=True)]


def test_what_a_press_left_is_found_in_the_cache(compare: Any, tmp_path: Path) -> None:
    kept_sets.save_model(KeptSetsConfig(folder=tmp_path, prompt=50), tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    press = compare.press_for("streaming_llm", {"sinks": 4}, 0.3)
    with torch.inference_mode():
        kept = compare.kept_by(model, torch.arange(50) % 7, press)
    assert kept == [[[*range(35, 50)]] * KV_HEADS] * LAYERS


def test_presses_get_our_parameters(compare: Any) -> None:
    expected = {
        "snap_kv": {"window_size": 32, "kernel_size": 5},
        "pyramid_kv": {"window_size": 8, "kernel_size": 5, "beta": 20.0},
        "expected_attention": {"n_sink": 4, "n_future_positions": 512},
        "streaming_llm": {"n_sink": 4},
    }
    for policy in POLICIES:
        press = compare.press_for(policy.name, vars(policy), 0.25)
        assert type(press).__name__.removesuffix("Press").lower() == policy.name.replace("_", "")
        assert (press.kept, press.parameters) == (0.25, expected[policy.name])


def test_sets_are_compared_per_layer(compare: Any) -> None:
    ours, theirs = [[[0, 1, 2, 3], [4, 5, 6, 7]]], [[[0, 1], [5, 8]]]
    (row,) = compare.compared(ours, [[[1, 0, 3, 2, 9], [5, 4, 6, 7, 8]]], theirs)
    assert (row["ours"], row["theirs"]) == (4, 2)
    assert row["jaccard"] == pytest.approx((2 / 4 + 1 / 5) / 2)
    assert row["jaccard_at_theirs"] == pytest.approx((2 / 2 + 1 / 3) / 2)
