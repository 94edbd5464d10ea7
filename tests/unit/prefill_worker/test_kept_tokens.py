"""What is said to be kept is what is in the parcel, whoever chose it."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vlcache.v1 import inference_pb2 as public
from vlcache.worker.v1 import prefill_pb2 as pb

from prefill_worker.compression.policies.ada_kv import AdaKV
from prefill_worker.compression.policies.look_ahead import LookAheadPolicy
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.policy import Policy
from prefill_worker.compute import PrefillCompute
from prefill_worker.engine.engine import PrefillEngine
from prefill_worker.job import Compressed, Event, PrefillJob
from prefill_worker.parcel.kept_tokens import MAX_EXPLAINED_BYTES, check_explainable
from prefill_worker.prompt import Prompt, PromptBuilder
from shared.errors import InvalidRequestError
from shared.kv.layout import KVLayout
from shared.kv.manifest import Manifest
from shared.model.identity import ModelIdentity
from shared.request.params import Budget, BudgetScope, Guard
from shared.request.sampling import Sampling
from shared.telemetry.metrics import PrefillMetrics
from tests.unit.decode_worker.tiny import KV_HEADS, LAYERS, tokenizer
from tests.unit.prefill_worker.pieces import TOKENS, Pieces, collect, run
from tests.unit.prefill_worker.pieces import job as plain_job
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture, user

POLICIES = (VLCache(min_tokens=4), AdaKV(window=4), LookAheadPolicy(tokens=3))
BUDGETS = (Budget(retention=0.3), Budget(retention=0.4, scope=BudgetScope.VISUAL), Budget(retention=1.0))


@pytest.fixture(scope="module")
def prompt(builder: PromptBuilder) -> Prompt:
    pictures = [encoded(picture(seed)) for seed in (1, 2)]
    return builder.build([user(*pictures, QUESTION)], max_new_tokens=1)


@pytest.fixture
def compute(engine: PrefillEngine, builder: PromptBuilder, checkpoint: Path) -> PrefillCompute:
    identity = ModelIdentity.of("tiny", checkpoint, builder._spec)
    return PrefillCompute(engine, tokenizer(), builder._spec, identity, PrefillMetrics(worker="p", model="tiny"))


def explained(**changes: Any) -> PrefillJob:
    sampling = Sampling(max_new_tokens=8, ignore_eos=True)
    return dataclasses.replace(plain_job(), sampling=sampling, explain=True, **changes)


def computed(compute: PrefillCompute, job: PrefillJob, prompt: Prompt) -> tuple[Manifest, bytes, public.Compression]:
    """Manifest, body and report."""
    events: list[Event] = []
    room = memoryview(bytearray(compute._identity.layout.full_bytes(prompt.shape.num_tokens + 8)))
    complete = compute.run(job, prompt, room, events.append, lambda budget: room)
    assert complete is not None
    (report,) = (event for event in events if isinstance(event, Compressed))
    manifest = complete()
    return manifest, bytes(room[: manifest.body_bytes]), report.message


def places(manifest: Manifest) -> np.ndarray:
    """[layers, heads, tokens] bool."""
    tokens = range(manifest.logical_length)
    bitmaps = [[bitmap[at // 8] >> at % 8 & 1 for at in tokens] for bitmap in manifest.kept_tokens]
    return np.array(bitmaps, dtype=bool).reshape(LAYERS, KV_HEADS, -1)


@pytest.mark.parametrize("guard", [Guard(), Guard(max_dropped_attention=1e-6)], ids=["plain", "guarded"])
@pytest.mark.parametrize("budget", BUDGETS, ids=["cache", "visual", "all"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_the_rows_of_the_parcel_are_those_tokens(
    compute: PrefillCompute, engine: PrefillEngine, prompt: Prompt, policy: Policy, budget: Budget, guard: Guard
) -> None:
    manifest, body, report = computed(compute, explained(policy=policy, budget=budget, guard=guard), prompt)
    manifest.check()
    keys = engine.prefill(prompt, (), threading.Event()).keys
    rows, kept = np.frombuffer(body, np.float32).reshape(-1, manifest.layout.head_dim), places(manifest)
    for section, key, heads in zip(manifest.layout.sections(manifest.num_kept), keys, kept, strict=True):
        at = section.key_offset // manifest.layout.row_bytes
        for head, chosen in enumerate(heads):
            wanted = key[head][torch.from_numpy(chosen[: prompt.shape.num_tokens])]
            np.testing.assert_array_equal(rows[at : at + len(wanted)], wanted)
            assert chosen[prompt.shape.num_tokens :].all(), "a token of the answer was dropped"
            at += section.rows[head]
    counts = kept[:, :, : prompt.shape.num_tokens].sum(axis=1)
    assert [list(layer) for layer in report.kept.layers] == counts.tolist()
    assert report.kept.num_kv_heads == KV_HEADS


def test_the_grids_lie_on_the_visual_tokens(compute: PrefillCompute, prompt: Prompt) -> None:
    _, _, report = computed(compute, explained(), prompt)
    covered = [grid.first_token + at for grid in report.kept.images for at in range(grid.rows * grid.columns)]
    assert len(report.kept.images) == 2
    assert covered == prompt.shape.visual.nonzero().flatten().tolist()


def test_nothing_is_told_unless_it_is_asked_for(compute: PrefillCompute, prompt: Prompt) -> None:
    asked = explained()
    told, plain = (computed(compute, dataclasses.replace(asked, explain=on), prompt) for on in (True, False))
    assert plain[0].kept_tokens == ()
    assert not plain[2].HasField("kept")
    told[2].ClearField("kept")
    assert told[2] == plain[2]
    assert (dataclasses.replace(told[0], kept_tokens=()), told[1]) == (plain[0], plain[1])


def test_the_request_asks_for_it() -> None:
    for explain in (True, False):
        compression = public.CompressionParams(policy="vl_cache", explain=explain)
        message = pb.PrefillRequest(
            request=public.GenerateRequest(compression=compression), ticket=pb.Ticket(decode_address="d:1", lease_s=1)
        )
        job = PrefillJob.from_proto(message, epoch="e", vocabulary=300, default_max_new_tokens=8, default_retention=0.1)
        assert job.explain is explain


def test_what_would_not_fit_a_message_is_refused() -> None:
    layout = KVLayout(num_layers=32, num_kv_heads=16, head_dim=128, dtype="bfloat16")
    most = MAX_EXPLAINED_BYTES // (32 * 2)
    check_explainable(most, layout)
    with pytest.raises(InvalidRequestError, match=f"{most + 1} tokens; at most {most}"):
        check_explainable(most + 1, layout)
    with pytest.raises(InvalidRequestError, match="256 KV heads"):
        check_explainable(1, dataclasses.replace(layout, num_kv_heads=256))


def test_the_report_of_the_longest_prompt_has_its_size() -> None:
    """One KV head: the client's byte per token is more than the manifest's bit."""
    layout = KVLayout(num_layers=8, num_kv_heads=1, head_dim=32, dtype="bfloat16")
    most = MAX_EXPLAINED_BYTES // 8
    check_explainable(most, layout)
    report = public.KeptTokens(layers=[bytes(most)] * layout.num_layers)
    assert MAX_EXPLAINED_BYTES <= report.ByteSize() < MAX_EXPLAINED_BYTES + 100


def test_a_prompt_too_long_to_explain_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefill_worker.parcel.kept_tokens.MAX_EXPLAINED_BYTES", TOKENS - 1)

    async def body(pieces: Pieces) -> None:
        with pytest.raises(InvalidRequestError, match="explain"):
            await collect(pieces, dataclasses.replace(plain_job(), explain=True))
        assert not pieces.computing.reached.is_set()
        assert len(await collect(pieces, plain_job("another"))) == 4

    run(body)
