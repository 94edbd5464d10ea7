"""The quality benchmark on the bundled model: one pass and one batch change nothing, and logits are the model's."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import pytest
import torch

from benchmarks.local_decoding import Track
from benchmarks.local_pipeline import LocalPipeline, local_job
from benchmarks.quality import __main__ as command
from benchmarks.quality.config import QualityConfig
from benchmarks.quality.outcome import Outcome
from benchmarks.quality.runner import QualityRunner, messages_for
from benchmarks.quality.setting import FULL, Setting
from models.shapes_vlm.held_out import draw_any
from models.shapes_vlm.paths import CHECKPOINT
from models.shapes_vlm.questions import draw_samples
from prefill_worker.compression.registry import POLICIES as POLICY_NAMES
from prefill_worker.compression.registry import build_policy
from prefill_worker.prompt import Prompt
from shared.errors import InvalidRequestError
from shared.request.params import Budget
from shared.rpc.options import MIB
from tests.unit.decode_worker.tiny import load_whole

TASKS = ("read", "shape", "which")
SETTINGS: dict[str, Any] = {"samples": 3, "tasks": TASKS, "dtype": "float32", "kv_memory_mib": 64, "max_new_tokens": 16}
POLICIES = ("vl_cache", "snap_kv:window=8", "fast_v", "oracle")
RETENTIONS = (1.0, 0.1)


def run(**changes: Any) -> dict[tuple[Setting, str], Outcome]:
    runner = QualityRunner(QualityConfig(**{**SETTINGS, **changes}))
    outcomes = list(runner.outcomes())
    found = {(each.setting, each.task): each for each in outcomes}
    assert len(found) == len(outcomes), "a question was counted twice"
    return found


@pytest.fixture(scope="module")
def together() -> dict[tuple[Setting, str], Outcome]:
    return run(policies=POLICIES, retentions=RETENTIONS)


def test_every_question_has_an_outcome_under_every_setting(together: dict[tuple[Setting, str], Outcome]) -> None:
    settings = {FULL, *(Setting(policy, retention) for policy in POLICIES for retention in RETENTIONS)}
    assert set(together) == {(setting, task) for setting in settings for task in TASKS}
    for (setting, _), outcome in together.items():
        assert outcome.compression.realised_retention <= setting.retention
    assert all(outcome.question == TASKS.index(task) for (_, task), outcome in together.items())


def test_what_the_model_refuses_is_left_out_unless_it_was_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint of which nobody knows what its layers may share."""
    monkeypatch.setattr(LocalPipeline, "__setattr__", without_sharing)
    runner = QualityRunner(QualityConfig(**SETTINGS, policies=("all",), retentions=(0.1,)))
    assert {setting.policy for setting in runner.settings} == set(POLICY_NAMES) - {"kv_sharer"}
    assert "kv_sharer is left out" in caplog.text
    with pytest.raises(InvalidRequestError, match="calibrate"):
        QualityRunner(QualityConfig(**SETTINGS, policies=("all", "kv_sharer"), retentions=(0.1,)))


def without_sharing(pipeline: LocalPipeline, name: str, value: Any) -> None:
    object.__setattr__(pipeline, name, None if name == "sharing" else value)


def test_retention_one_is_the_full_cache(together: dict[tuple[Setting, str], Outcome]) -> None:
    for (setting, task), outcome in together.items():
        if setting.retention == 1:
            assert outcome.agreement == 1
            assert outcome.gap == pytest.approx(0, abs=1e-4)
            assert outcome.right == together[FULL, task].right
    assert any(outcome.gap > 0.01 for outcome in together.values())


@pytest.mark.parametrize("policy", ["snap_kv:window=8", "fast_v"])
def test_a_policy_alone_and_one_by_one_gives_the_same(
    together: dict[tuple[Setting, str], Outcome], policy: str
) -> None:
    alone = run(policies=(policy,), retentions=(0.1,), batch=1)
    for key, outcome in alone.items():
        same = together[key]
        assert (outcome.right, outcome.agreement) == (same.right, same.agreement)
        assert outcome.gap == pytest.approx(same.gap, abs=1e-4)
        assert outcome.compression == same.compression


def test_a_pool_that_holds_few_sequences_makes_the_others_wait(together: dict[tuple[Setting, str], Outcome]) -> None:
    memory_mib = 16
    assert sum(together[FULL, task].compression.kept_bytes for task in TASKS) > memory_mib * MIB
    tight = run(policies=("vl_cache",), retentions=(0.5, 0.1), kv_memory_mib=memory_mib)
    for task in TASKS:
        key = Setting("vl_cache", 0.1), task
        assert (tight[key].right, tight[key].agreement) == (together[key].right, together[key].agreement)


@pytest.fixture(scope="module")
def pipeline() -> LocalPipeline:
    return LocalPipeline(str(CHECKPOINT), dtype="float32", threads=1, kv_memory_mib=32, max_num_seqs=4)


@pytest.fixture(scope="module")
def prompt(pipeline: LocalPipeline) -> Prompt:
    (sample,) = draw_samples(seed=3, count=1, tasks=("read",))
    return pipeline.build(messages_for(sample), max_new_tokens=8)


def test_an_earlier_turn_stands_between_the_images_and_the_question() -> None:
    (sample,) = draw_any(seed=3, count=1, tasks=("second_turn_in_two",))
    messages = messages_for(sample)
    ((question, answer),) = sample.before
    assert [message.role for message in messages] == ["user", "assistant", "user"]
    assert [part.HasField("image") for part in messages[0].parts] == [True, True, False]
    assert [message.parts[-1].text for message in messages] == [question, answer, sample.question]


@torch.inference_mode()
def teacher_forced(prompt: Prompt, tokens: list[int]) -> list[float]:
    """Log-probabilities of the tokens after the prompt, by transformers alone."""
    answer = torch.tensor([tokens])
    whole = {**prompt.inputs, "input_ids": torch.cat([prompt.inputs["input_ids"], answer], dim=1)}
    logits = load_whole(CHECKPOINT)(**whole).logits[0, -len(tokens) - 1 : -1]
    return logits.log_softmax(dim=-1).gather(1, answer.T)[:, 0].tolist()


def test_log_probabilities_are_those_of_the_model(pipeline: LocalPipeline, prompt: Prompt) -> None:
    job = local_job(build_policy("", {}), Budget(retention=1.0), max_new_tokens=8)
    prefilled = pipeline.prefill(prompt, [job])
    parcel = pipeline.compress(prompt, prefilled, job)
    free, forced = parcel.track(), parcel.track(along=(7, 300, 12, 99, 5))
    for track in (free, forced):
        pipeline.decoding.add(track)
    ended = list[Track]()
    while not pipeline.decoding.idle:
        ended += pipeline.decoding.step()
    assert set(ended) == {free, forced}
    for track, fed in ((free, free.drawn), (forced, list(forced.along or ()))):
        first, *others = teacher_forced(prompt, fed)
        assert prefilled.logits.log_softmax(dim=-1)[fed[0]].item() == pytest.approx(first, abs=1e-3)
        assert track.log_probabilities == pytest.approx(others, abs=1e-3)
    assert forced.drawn != list(forced.along or ())


def test_it_prints_tables_and_one_json_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    flags = ["--samples=2", "--tasks", "read", "shape", "--policies", "snap_kv", "--retentions", "0.1", "--json=-"]
    monkeypatch.setattr(sys, "argv", ["quality", *flags])
    command.main()
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["workload"]["scope"] == "cache"
    assert Counter(row["policy"] for row in found["results"]) == {"full": 3, "snap_kv": 3}
    header = ["policy", "---"]
    first_cells = [line.split()[1] for line in lines if line.startswith("|")]
    assert first_cells == [*header, "full", "snap_kv", *header, "full", *header, "snap_kv"]
