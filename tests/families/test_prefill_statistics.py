"""What policies are told of attention, against the matrices of a model that returns them (`eager`)."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.pipeline import select_tokens, sparse_prefill_for, statistics_for
from prefill_worker.compression.policies.fast_v import FastV
from prefill_worker.compression.registry import POLICIES, build_policy
from prefill_worker.compression.rows import post_vision_rows
from prefill_worker.compression.statistics import ColumnSums, Statistic, Sweep
from shared.errors import InvalidRequestError
from shared.request.params import Budget
from tests.families.chats import CHATS, QUESTION, WIDE, Chat, asked, inputs_of
from tests.families.family import KV_HEADS, LAYERS, QUERY_HEADS, REFUSE_SPARSE, Family
from tests.families.loaded import Loaded
from tests.families.oracle import Evicted, Oracle
from tests.families.prefilling import Prefilling, close
from tests.unit.prefill_worker.sharing import sharing

THRESHOLD = 0.05
# without a text behind the image, rows of the image itself are observed
OBSERVED = ("several images", "image last", "text")
SHARING = sharing((2, 0))
POLICIES_HERE = [build_policy(name, {}).for_checkpoint(SHARING) for name in POLICIES]
every_policy = pytest.mark.parametrize("policy", POLICIES_HERE, ids=[*POLICIES])


@pytest.fixture(scope="session")
def eager(loaded: Loaded) -> Any:
    return AutoModelForImageTextToText.from_pretrained(loaded.folder, attn_implementation="eager").eval()


@dataclass(frozen=True)
class AllWeights(Statistic[torch.Tensor]):
    def measure(self, layer: LayerAttention) -> torch.Tensor:
        return layer.weights(range(layer.prompt.num_tokens))


@torch.inference_mode()
def matrices(eager: Any, prefilling: Prefilling, chat: Chat) -> list[torch.Tensor]:
    """Per layer [num_query_heads, num_tokens, num_tokens]."""
    output = eager(**inputs_of(prefilling.loaded, chat), output_attentions=True)
    return [layer[0] for layer in output.attentions]


@pytest.mark.parametrize("kind", OBSERVED)
def test_statistics_are_those_of_the_attention_matrix(prefilling: Prefilling, eager: Any, kind: str) -> None:
    prompt = prefilling.prompt(CHATS[kind])
    rows = post_vision_rows(prompt.shape)
    some = (*range(0, rows.start, 3), *rows)
    statistics = (Sweep(rows, THRESHOLD), ColumnSums(some), AllWeights())
    measured = prefilling.run(CHATS[kind], statistics).measured
    for layer, weights in zip(measured, matrices(eager, prefilling, CHATS[kind]), strict=True):
        sweep, sums, everything = (layer[statistic] for statistic in statistics)
        assert close(everything, weights)
        seen = weights[:, rows]
        assert close(sweep.column_sums, grouped(seen))
        assert close(sums, grouped(weights[:, list(some)]))
        least = THRESHOLD * seen.amax(dim=2, keepdim=True)
        assert torch.equal(sweep.counts, ((seen >= least) & (seen > 0)).sum(dim=(1, 2)))


def grouped(rows: torch.Tensor) -> torch.Tensor:
    """[num_kv_heads, num_tokens] of [num_query_heads, rows, num_tokens]."""
    return rows.sum(dim=1).view(KV_HEADS, QUERY_HEADS // KV_HEADS, -1).sum(dim=1)


@every_policy
def test_every_policy_chooses_or_says_why_not(family: Family, prefilling: Prefilling, policy: Any) -> None:
    prompt, budget = prefilling.prompt(CHATS["several images"]), Budget(retention=0.3)
    sparse = sparse_prefill_for(policy, prompt.shape, budget, prefilling.spec.layout.num_layers)

    def run() -> Any:
        statistics = statistics_for(policy, prompt.shape)
        return prefilling.engine.prefill(prompt, statistics, threading.Event(), sparse)

    if sparse is not None and family.name in REFUSE_SPARSE:
        with pytest.raises(InvalidRequestError, match="this model does not allow"):
            run()
        return
    if policy.look_ahead:
        pytest.skip("looks ahead first")
    selections = select_tokens(policy, run().observed(prompt.shape), budget)
    assert all(selection.num_kept(KV_HEADS, prompt.shape.num_tokens) for selection in selections)


def test_a_pass_that_drops_tokens_is_one_where_nobody_sees_them(
    family: Family, prefilling: Prefilling, oracle: Oracle
) -> None:
    if family.name in REFUSE_SPARSE:
        pytest.skip("refused")
    policy, budget, chat = FastV(layer=1), Budget(retention=0.7), CHATS["several images"]
    prompt = prefilling.prompt(chat)
    sparse = sparse_prefill_for(policy, prompt.shape, budget, LAYERS)
    found = prefilling.engine.prefill(prompt, statistics_for(policy, prompt.shape), threading.Event(), sparse)
    assert found.survivors is not None
    dropped = (~found.survivors).nonzero().flatten().tolist()
    assert dropped
    nobody: Evicted = [[[]] * KV_HEADS] + [[dropped] * KV_HEADS] * (LAYERS - 1)
    assert close(found.logits.double(), oracle.prefill(inputs_of(prefilling.loaded, chat), nobody))


def test_looking_ahead_draws_the_tokens_of_generate(prefilling: Prefilling) -> None:
    chat, steps = asked(WIDE, QUESTION), 6
    prompt, drawn = prefilling.prompt(chat), list[int]()
    prefilled = prefilling.engine.prefill(prompt, (), threading.Event())

    def draw(logits: torch.Tensor) -> int:
        drawn.append(int(logits.argmax()))
        return drawn[-1]

    first = draw(prefilled.logits)
    looked = prefilling.engine.look_ahead(prefilled, first, prompt.next_position, steps, draw)
    assert drawn == prefilling.loaded.answer(inputs_of(prefilling.loaded, chat), steps + 1)
    assert all(bool(torch.isfinite(attention).all()) for attention in looked.ahead if attention is not None)
