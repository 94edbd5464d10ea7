"""Shadow mode over real workers: the agreement it exports is the one that a client would measure."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator

import pytest
import vlcache

from models.shapes_vlm.questions import draw_samples
from router.shadow import agreement
from tests.integration.running_stack import RunningStack
from tests.integration.test_observability import samples_of
from tests.unit.router.test_process import router

SAMPLES = list(draw_samples(seed=990_023, count=3))


class ShadowingRouter:
    """A second router in front of the stack's workers, which repeats everything."""

    def __init__(self, address: str, metrics_address: str) -> None:
        self.address = address
        self._metrics_url = f"http://{metrics_address}/metrics"

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(self._metrics_url, timeout=10) as response:
            return sum(samples_of(response.read().decode(), f"vlcache_{name}"))

    def wait_for_replays(self, count: int) -> None:
        give_up = time.monotonic() + 20
        while self.metric("shadow_requests_total") < count:
            assert time.monotonic() < give_up
            time.sleep(0.02)


@pytest.fixture(scope="module")
def shadowing(memory_stack: RunningStack) -> Iterator[ShadowingRouter]:
    workers = ",".join(service.address for service in memory_stack.services if service.role != "router")
    with router("--registry", f"static://{workers}", "--shadow-share", "1") as (_, line):
        yield ShadowingRouter(line["address"], line["metrics"])


def test_the_agreement_is_that_of_a_request_at_retention_1(
    shadowing: ShadowingRouter, memory_stack: RunningStack
) -> None:
    measured = []
    with vlcache.Client(shadowing.address) as client:
        client.wait_ready(20)
        for number, sample in enumerate(SAMPLES, start=1):
            sampling = vlcache.Sampling(max_new_tokens=12, ignore_eos=True, temperature=0.7, seed=number)
            answers = [
                client.generate(
                    sample.question,
                    images=sample.images,
                    sampling=sampling,
                    compression=vlcache.Compression(retention=retention),
                )
                for retention in (1.0, 0.02)
            ]
            # the next request would end it
            shadowing.wait_for_replays(number)
            full, compressed = (answer.token_ids for answer in answers)
            measured.append(agreement(compressed, full))
    assert min(measured) < 1, "nothing to see: choose other samples"
    assert shadowing.metric("shadow_agreement_ratio_count") == len(SAMPLES)
    assert shadowing.metric("shadow_agreement_ratio_sum") == pytest.approx(sum(measured))
    assert shadowing.metric("requests_total") == 2 * len(SAMPLES)
    memory_stack.wait_idle()
