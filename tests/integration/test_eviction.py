"""Policies that go on while tokens are generated, through three real processes."""

from __future__ import annotations

import pytest
import vlcache

from models.shapes_vlm.questions import Sample, draw_samples
from tests.integration.reference import Reference
from tests.integration.running_stack import RunningStack

SAMPLING = vlcache.Sampling(max_new_tokens=60, ignore_eos=True)
EVICTING = {
    "h2o": {},
    "elastic_cache": {},
    "prefix_kv": {},
    "tgv_kv": {},
    "scope": {"decode_window": 16, "decode_recent": 8},
    "tidal_decode": {"first": 1, "second": 3, "top": 8},
    "kv_sharer": {"layers": 2},
}
NOTHING_CHANGES: dict[str, dict[str, object]] = {
    "h2o": {},
    "elastic_cache": {},
    "scope": {},
    "tidal_decode": {"top": 100_000},
    "kv_sharer": {"layers": 5},
}


@pytest.fixture(scope="module")
def sample() -> Sample:
    return next(iter(draw_samples(seed=990_002, count=1)))


@pytest.mark.parametrize("policy", EVICTING)
def test_both_transports_carry_all_that_an_eviction_needs(
    memory_stack: RunningStack, grpc_stack: RunningStack, sample: Sample, policy: str
) -> None:
    compression = vlcache.Compression(policy=policy, retention=0.3, parameters=EVICTING[policy])
    answers = []
    for stack in (memory_stack, grpc_stack):
        with stack.client() as client:
            asked = client.generate(sample.question, images=sample.images, sampling=SAMPLING, compression=compression)
        answers.append(asked)
        stack.wait_idle()
    assert answers[0].token_ids == answers[1].token_ids
    assert len(answers[0].token_ids) == SAMPLING.max_new_tokens


@pytest.mark.parametrize("policy", NOTHING_CHANGES)
def test_at_retention_one_nothing_is_dropped(
    stack: RunningStack, reference: Reference, sample: Sample, policy: str
) -> None:
    compression = vlcache.Compression(policy=policy, retention=1.0, parameters=NOTHING_CHANGES[policy])
    with stack.client() as client:
        answer = client.generate(sample.question, images=sample.images, sampling=SAMPLING, compression=compression)
    expected = reference.generate(sample.question, sample.images, max_new_tokens=60, ignore_eos=True)
    assert list(answer.token_ids) == expected


def test_a_sparse_read_at_retention_one_reads_less(
    memory_stack: RunningStack, reference: Reference, sample: Sample
) -> None:
    few = vlcache.Compression(policy="tidal_decode", retention=1.0, parameters={"first": 0, "second": 1, "top": 2})
    with memory_stack.client() as client:
        answer = client.generate(sample.question, images=sample.images, sampling=SAMPLING, compression=few)
    full = reference.generate(sample.question, sample.images, max_new_tokens=60, ignore_eos=True)
    assert answer.compression is not None
    assert answer.compression.realised_retention == 1.0
    assert list(answer.token_ids) != full
