"""What a policy with a pass of its own ships: through the worker's computation, on the tiny model."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from prefill_worker.compression.pipeline import select_tokens, sparse_prefill_for, statistics_for
from prefill_worker.compression.policies.fast_v import FastV
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.policies.zip_vl import ZipVL
from prefill_worker.compression.policy import Policy
from prefill_worker.compute import PrefillCompute
from prefill_worker.engine.engine import Prefilled, PrefillEngine
from prefill_worker.job import FirstToken, PrefillJob
from prefill_worker.parcel.writer import kept_counts, write_body
from prefill_worker.prompt import Prompt, PromptBuilder
from shared.kernels.dispatch import kernels_for
from shared.model.identity import ModelIdentity
from shared.request.params import Budget
from shared.request.sampling import Sampling
from shared.telemetry.metrics import PrefillMetrics
from tests.unit.decode_worker.tiny import LAYERS, tokenizer
from tests.unit.prefill_worker.compression.observing import positions
from tests.unit.prefill_worker.pieces import job as plain_job
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture, user

SPARSE = pytest.mark.parametrize("policy", [FastV(layer=1), FastV(), ZipVL(theta=0.8)], ids=["K=1", "K=2", "zip_vl"])
RETENTIONS = pytest.mark.parametrize("retention", [0.2, 0.85])


@pytest.fixture(scope="module")
def prompt(builder: PromptBuilder) -> Prompt:
    return builder.build([user(encoded(picture(1)), QUESTION)], max_new_tokens=1)


@pytest.fixture
def compute(engine: PrefillEngine, builder: PromptBuilder, checkpoint: Path) -> PrefillCompute:
    identity = ModelIdentity.of("tiny", checkpoint, builder._spec)
    return PrefillCompute(engine, tokenizer(), builder._spec, identity, PrefillMetrics(worker="p", model="tiny"))


def job(policy: Policy, retention: float) -> PrefillJob:
    sampling, budget = Sampling(max_new_tokens=8, ignore_eos=True), Budget(retention=retention)
    return dataclasses.replace(plain_job(), sampling=sampling, budget=budget, policy=policy)


def sparse_pass(engine: PrefillEngine, prompt: Prompt, work: PrefillJob) -> Prefilled:
    sparse = sparse_prefill_for(work.policy, prompt.shape, work.budget, LAYERS)
    return engine.prefill(prompt, statistics_for(work.policy, prompt.shape), threading.Event(), sparse)


def rows_of(prefilled: Prefilled, kept: Sequence[list[list[int]]]) -> torch.Tensor:
    """The rows of a parcel, one after another, from positions in the prompt."""
    rows = []
    for keys, values, heads in zip(prefilled.keys, prefilled.values, kept, strict=True):
        present = list(range(keys.shape[1]))
        if prefilled.survivors is not None and keys.shape[1] < len(prefilled.survivors):
            present = prefilled.survivors.nonzero().flatten().tolist()
        for tensor in (keys, values):
            rows += [tensor[head][present.index(at)] for head, places in enumerate(heads) for at in places]
    return torch.stack(rows)


@SPARSE
@RETENTIONS
def test_the_parcel_holds_the_kept_tokens_of_its_own_pass(
    compute: PrefillCompute, engine: PrefillEngine, prompt: Prompt, policy: Policy, retention: float
) -> None:
    work, events = job(policy, retention), []
    layout = compute._identity.layout
    body = memoryview(bytearray(layout.full_bytes(work.budget.kept_tokens_bound(0, prompt.shape.num_tokens))))
    complete = compute.run(work, prompt, body, events.append)
    assert complete is not None
    manifest = complete()
    manifest.check()
    manifest.check_digest(body[: manifest.body_bytes])
    prefilled = sparse_pass(engine, prompt, work)
    first = events[0]
    assert isinstance(first, FirstToken)
    assert first.token == int(prefilled.logits.argmax())
    assert (manifest.logical_length, manifest.next_position) == (prompt.shape.num_tokens,) * 2
    kept = [positions(chosen) for chosen in select_tokens(policy, prefilled.observed(prompt.shape), work.budget)]
    assert manifest.num_kept == tuple(len(head) for layer in kept for head in layer)
    found = np.frombuffer(body[: manifest.body_bytes], dtype=np.float32).reshape(-1, layout.head_dim)
    np.testing.assert_array_equal(found, rows_of(prefilled, kept))


def test_layers_of_one_length_are_gathered_at_once(
    compute: PrefillCompute, engine: PrefillEngine, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, launches = kernels_for(torch.device("cpu")), []

    def watched(keys: list[torch.Tensor], *others: object) -> None:
        launches.append(len(keys))
        kernels.gather_rows(keys, *others)  # type: ignore[arg-type]

    probed = dataclasses.replace(kernels, gather_rows=watched)
    monkeypatch.setattr("prefill_worker.parcel.writer.kernels_for", lambda _: probed)
    for policy, expected in ((FastV(layer=1), [1, 2]), (ZipVL(), [3])):
        work = job(policy, 0.85)
        prefilled = sparse_pass(engine, prompt, work)
        selections = select_tokens(policy, prefilled.observed(prompt.shape), work.budget)
        layout, counts = compute._identity.layout, kept_counts(prefilled, selections)
        write_body(prefilled, selections, counts, layout, memoryview(bytearray(layout.body_bytes(counts))))
        assert launches == expected
        launches.clear()


@pytest.mark.parametrize("policy", [FastV(image_share=0.1), ZipVL(theta=0.1)])
def test_retention_one_is_the_whole_pass(
    compute: PrefillCompute, engine: PrefillEngine, prompt: Prompt, policy: Policy
) -> None:
    whole = engine.prefill(prompt, (), threading.Event())
    found = compute.prefill([job(policy, 1.0), job(VLCache(), 1.0)], prompt, threading.Event())
    assert torch.equal(found.logits, whole.logits)
    assert all(torch.equal(one, other) for one, other in zip(found.keys, whole.keys, strict=True))


@pytest.mark.parametrize("retention", [0.5, 1.0])
def test_a_pass_of_its_own_is_shared_with_no_other(compute: PrefillCompute, prompt: Prompt, retention: float) -> None:
    with pytest.raises(AssertionError, match="shares"):
        compute.prefill([job(FastV(), 0.5), job(VLCache(), retention)], prompt, threading.Event())
