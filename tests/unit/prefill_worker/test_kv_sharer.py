"""Layers that share KV, from the pass through the parcel to the answer, against a model written out in float64."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from decode_worker.engine import EagerEngine
from decode_worker.eviction.kinds import opened
from decode_worker.graph_engine import GraphEngine
from decode_worker.kv_pool.base import growth_of
from decode_worker.parcel_reader import plain_body
from decode_worker.sequence import Sequence, resumed
from prefill_worker.calibrate import Calibration, CalibrationConfig, calibrate, read_prompts
from prefill_worker.compression.layer_sharing import SharedPair
from prefill_worker.compression.policies.kv_sharer import KVSharer
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.sparse.kv_sharer import KVSharerPrefill
from prefill_worker.compute import PrefillCompute
from prefill_worker.engine.engine import PrefillEngine
from prefill_worker.job import Compressed, Event, PrefillJob
from prefill_worker.prompt import Prompt, PromptBuilder
from shared.kv.eviction import SharedLayers
from shared.kv.manifest import Manifest
from shared.model.identity import ModelIdentity
from shared.model.loading import load_decode_model, load_prefill_model
from shared.request.params import Budget, Wire
from shared.request.sampling import Sampling
from shared.telemetry.metrics import PrefillMetrics
from tests.unit.decode_worker.pools import CPU, POOLS, Pool, block_pool, poison
from tests.unit.decode_worker.sequences import LAYOUT, advance
from tests.unit.decode_worker.tiny import KV_HEADS, LAYERS, load_whole, tokenizer
from tests.unit.prefill_worker.naive_pass import NaivePass, Rule, naive_pass
from tests.unit.prefill_worker.pieces import job as plain_job
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture, user
from tests.unit.prefill_worker.sharing import sharer

CLOSE = {"rtol": 5e-4, "atol": 5e-4}
STEPS = 12
PAIRS = ((2, 0), (1, 0))
SHARINGS = {"one": {2: 0}, "the nearest": {2: 1}, "all": {1: 0, 2: 0}}


class NaiveSharing(Rule):
    def __init__(self, lender_of: Mapping[int, int]) -> None:
        self.lender_of = lender_of

    def lender(self, layer: int) -> int | None:
        return self.lender_of.get(layer)


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> Any:
    return load_whole(checkpoint, dtype=torch.float64)


@pytest.fixture(scope="module")
def prompt(builder: PromptBuilder) -> Prompt:
    return builder.build([user(encoded(picture(1)), QUESTION)], max_new_tokens=1)


@pytest.fixture
def compute(engine: PrefillEngine, builder: PromptBuilder, checkpoint: Path) -> PrefillCompute:
    identity = ModelIdentity.of("tiny", checkpoint, builder._spec)
    metrics = PrefillMetrics(worker="p", model="tiny")
    # which no pass of this policy does
    return PrefillCompute(engine, tokenizer(), builder._spec, identity, metrics, cascade=True)


def naive(exact: Any, prompt: Prompt, lender_of: Mapping[int, int], answer: tuple[int, ...] = ()) -> NaivePass:
    """Over a prompt and what was answered so far."""
    with torch.inference_mode():
        inputs = {name: part.double() if part.is_floating_point() else part for name, part in prompt.inputs.items()}
        begun = exact(**inputs, output_hidden_states=True, use_cache=False).hidden_states[0][0]
        fed = exact.get_input_embeddings()(torch.tensor(answer, dtype=torch.int64))
    return naive_pass(exact, torch.cat((begun, fed)), NaiveSharing(lender_of))


def job(policy: Policy, retention: float, **changes: Any) -> PrefillJob:
    sampling, budget = Sampling(max_new_tokens=STEPS + 1, ignore_eos=True), Budget(retention=retention)
    return dataclasses.replace(plain_job(), sampling=sampling, budget=budget, policy=policy, **changes)


def shipped(compute: PrefillCompute, prompt: Prompt, work: PrefillJob) -> tuple[Manifest, memoryview]:
    """A parcel as a decode worker reads it."""
    body, events = memoryview(bytearray(1 << 20)), list[Event]()
    complete = compute.run(work, prompt, body, events.append)
    assert complete is not None
    manifest = Manifest.from_proto(complete().to_proto())
    compressed = events[-1]
    assert isinstance(compressed, Compressed)
    assert compressed.message.kept_bytes == manifest.layout.body_bytes(manifest.num_kept)
    return manifest, body[: manifest.body_bytes]


def installed(pool: Pool, manifest: Manifest, body: memoryview) -> Sequence:
    rows, eviction = opened(manifest, plain_body(manifest, body, verify=True) if manifest.encoding else body)
    nbytes = pool.sequence_bytes(manifest.num_kept, growth_of(STEPS, eviction))
    kv = pool.install(pool.allocate(nbytes), manifest.num_kept, rows, STEPS, eviction)
    return Sequence.from_manifest(manifest, kv, resumed(manifest, frozenset()))


@pytest.mark.parametrize("lender_of", SHARINGS.values(), ids=SHARINGS)
def test_a_pass_in_which_layers_read_another_ones_kv(
    engine: PrefillEngine, exact: Any, prompt: Prompt, lender_of: dict[int, int]
) -> None:
    found = engine.prefill(prompt, (), threading.Event(), KVSharerPrefill(lender_of))
    expected = naive(exact, prompt, lender_of)
    torch.testing.assert_close(found.logits.double(), expected.logits, **CLOSE)
    for layer in range(LAYERS):
        torch.testing.assert_close(found.keys[layer].double(), expected.keys[layer], **CLOSE)
        torch.testing.assert_close(found.values[layer].double(), expected.values[layer], **CLOSE)
        # what a borrowing layer made itself is gone
        assert found.keys[layer] is found.keys[lender_of.get(layer, layer)]
    assert not torch.allclose(found.logits, engine.prefill(prompt, (), threading.Event()).logits, atol=1e-3)


class Noting:
    """A model whose logits can be looked at after each call."""

    device = CPU

    def __init__(self, model: Any) -> None:
        self._model, self.logits = model, torch.empty(0)

    def __call__(self, **inputs: Any) -> Any:
        output = self._model(**inputs)
        self.logits = output.logits[:, -1].clone()
        return output


@pytest.mark.parametrize("storage", ["slabs", "blocks of 3"])
@pytest.mark.parametrize(("retention", "lender_of"), [(0.67, {2: 0}), (0.34, {1: 0, 2: 0})])
def test_prompt_and_answer_are_those_of_the_model_that_shares(
    compute: PrefillCompute,
    exact: Any,
    checkpoint: Path,
    prompt: Prompt,
    storage: str,
    retention: float,
    lender_of: dict[int, int],
) -> None:
    """Sharing alone is enough for these budgets, so no token is missing."""
    manifest, body = shipped(compute, prompt, job(sharer(*PAIRS), retention))
    tokens = prompt.shape.num_tokens
    kept = [0 if layer in lender_of else tokens for layer in range(LAYERS) for _ in range(KV_HEADS)]
    assert list(manifest.num_kept) == kept
    assert manifest.realised_retention <= retention
    assert len(body) == LAYOUT.body_bytes(kept)
    assert manifest.eviction == SharedLayers(borrowers=tuple(lender_of), lenders=tuple(lender_of.values()))
    pool = POOLS[storage](LAYOUT, 1 << 20)
    poison(pool)
    model = Noting(load_decode_model(checkpoint, dtype=torch.float32, device=CPU))
    each, answer = installed(pool, manifest, body), manifest.generated
    for _ in range(STEPS):
        advance([each], EagerEngine(model, pool).step([each]))  # type: ignore[arg-type]
        expected = naive(exact, prompt, lender_of, answer).logits
        torch.testing.assert_close(model.logits[0].double(), expected, **CLOSE)
        answer = (*answer, each.last_token)
    grown = pool.export(each.kv)
    assert list(grown.num_kept) == [count + STEPS if count else 0 for count in kept]


def answer_of(engine: Any, each: Sequence) -> list[int]:
    made = []
    for _ in range(STEPS):
        advance([each], engine.step([each]))
        made.append(each.last_token)
    return made


@pytest.mark.parametrize(
    "wire",
    [Wire(), Wire(bits=8, group=8, residual=4), Wire(key_channels=0.5), Wire(bits=4, group=8, key_channels=0.75)],
)
def test_few_tokens_of_few_layers_travel_and_are_answered_alike_everywhere(
    compute: PrefillCompute, checkpoint: Path, prompt: Prompt, wire: Wire
) -> None:
    manifest, body = shipped(compute, prompt, job(sharer(*PAIRS, layers=1), 0.4, wire=wire, explain=True))
    assert manifest.num_kept[-KV_HEADS:] == (0,) * KV_HEADS
    assert all(0 < count < prompt.shape.num_tokens for count in manifest.num_kept[:-KV_HEADS])
    assert (manifest.encoding is None) == wire.plain
    assert not any(b"".join(manifest.kept_tokens[-KV_HEADS:]))
    model = load_decode_model(checkpoint, dtype=torch.float32, device=CPU)
    slabs, blocks = POOLS["slabs"](LAYOUT, 1 << 20), block_pool(LAYOUT, 1 << 20, block_size=4, max_num_seqs=2)
    for pool in (slabs, blocks):
        poison(pool)
    eager = answer_of(EagerEngine(model, slabs), installed(slabs, manifest, body))
    assert answer_of(GraphEngine(model, blocks, max_num_seqs=2), installed(blocks, manifest, body)) == eager


def test_at_retention_one_nothing_is_shared(compute: PrefillCompute, engine: PrefillEngine, prompt: Prompt) -> None:
    manifest, _ = shipped(compute, prompt, job(sharer(*PAIRS, layers=2), 1.0))
    assert manifest.eviction is None
    assert set(manifest.num_kept) == {prompt.shape.num_tokens}
    whole = engine.prefill(prompt, (), threading.Event())
    found = compute.prefill([job(sharer(*PAIRS, layers=2), 1.0)], prompt, threading.Event())
    assert torch.equal(found.logits, whole.logits)
    assert all(torch.equal(one, other) for one, other in zip(found.keys, whole.keys, strict=True))


@pytest.fixture(scope="module")
def calibration(checkpoint: Path, builder: PromptBuilder) -> Calibration:
    model = load_prefill_model(checkpoint, dtype=torch.float32, device=CPU)
    asked = [user(encoded(picture(seed)), text) for seed, text in ((1, QUESTION), (2, "And here?"))]
    return Calibration(PrefillEngine(model), model, [builder.build([each], max_new_tokens=1) for each in asked])


def test_pairs_are_ranked_by_the_distance_of_their_mean_kv(calibration: Calibration, exact: Any) -> None:
    passes = [naive(exact, prompt, {}) for prompt in calibration._prompts]
    expected = []
    for low in range(LAYERS):
        for high in range(low + 1, LAYERS):
            square = 0.0
            for kind in ("keys", "values"):
                means = [
                    sum(getattr(each, kind)[layer].mean(dim=1) for each in passes) / len(passes)
                    for layer in (low, high)
                ]
                square += (means[0] - means[1]).square().sum().item()
            expected.append((low, high, square**0.5))
    expected.sort(key=lambda pair: -pair[2])
    found = calibration.ranked()
    assert [pair[:2] for pair in found] == [pair[:2] for pair in expected]
    assert [pair[2] for pair in found] == pytest.approx([pair[2] for pair in expected], rel=1e-4)


def hidden_of(exact: Any, prompt: Prompt, lender_of: Mapping[int, int]) -> torch.Tensor:
    """Last hidden states of text, from the norm that the written-out pass ends with."""
    seen = []
    with exact.get_decoder().norm.register_forward_hook(lambda module, args, output: seen.append(output)):
        naive(exact, prompt, lender_of)
    return seen[-1][~prompt.shape.visual]


def test_a_pair_is_judged_by_the_last_hidden_states(calibration: Calibration, exact: Any) -> None:
    for lender_of in ({2: 0}, {1: 0, 2: 0}):
        means = []
        for prompt in calibration._prompts:
            pairs = zip(hidden_of(exact, prompt, lender_of), hidden_of(exact, prompt, {}), strict=True)
            each = [(one @ other / one.norm() / other.norm()).item() for one, other in pairs]
            means.append(sum(each) / len(each))
        assert calibration.cosine(lender_of) == pytest.approx(sum(means) / len(means), abs=1e-4)
    assert calibration.cosine({}) == pytest.approx(1)


class Scripted(Calibration):
    """Any distances and cosines."""

    def __init__(self, ranked: list[tuple[int, int, float]], cosines: Mapping[tuple[int, ...], float]) -> None:
        self._script, self._cosines = ranked, cosines

    def ranked(self) -> list[tuple[int, int, float]]:
        return self._script

    def cosine(self, lender_of: Mapping[int, int]) -> float:
        return self._cosines[tuple(sorted(lender_of))]


def test_the_most_distant_pairs_share_as_long_as_the_model_stays_similar() -> None:
    ranked = [(1, 3, 9.0), (0, 3, 8.0), (3, 4, 7.0), (0, 1, 6.0), (0, 4, 5.0), (0, 2, 4.0), (1, 5, 3.0)]
    script = Scripted(ranked, {(3,): 0.9, (3, 4): 0.4, (2, 3): 0.8, (2, 3, 5): 0.5})
    assert list(script.pairs(0.5)) == [
        SharedPair(borrower=3, lender=1, distance=9.0, cosine=0.9),
        SharedPair(borrower=2, lender=0, distance=4.0, cosine=0.8),
    ]


def test_what_the_command_finds_is_what_the_policy_takes(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).symlink_to(file)
    (tmp_path / "one.png").write_bytes(encoded(picture(1)))
    prompts = tmp_path / "prompts.json"
    prompts.write_text('[{"images": ["one.png"], "question": "What?", "answer": "that"}, {"question": "Who?"}]')
    found = calibrate(CalibrationConfig(model=str(copy), prompts=prompts, threshold=-1.0, dtype="float32"))
    assert found.prompts.startswith("2 prompts of prompts.json, ")
    taken = KVSharer().for_checkpoint(found)
    assert taken.pairs == tuple((pair.borrower, pair.lender) for pair in found.pairs)
    with pytest.raises(ValueError, match="no pair"):
        calibrate(CalibrationConfig(model=str(copy), prompts=prompts, threshold=1.0, dtype="float32"))


@pytest.mark.parametrize("text", ["[]", "{}", "[3]", '[{"images": []}]', "nothing", '{"question": "?"}'])
def test_a_file_of_other_things_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(ValueError):
        read_prompts(tmp_path / "prompts.json")


def test_a_threshold_is_a_cosine() -> None:
    with pytest.raises(ValueError, match="threshold"):
        CalibrationConfig(model="m", prompts=Path("p"), threshold=1.1)
