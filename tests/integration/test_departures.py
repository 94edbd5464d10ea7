"""Clients leave and deadlines pass at every stage: the workers end with nothing in their hands."""

from __future__ import annotations

import random
import threading
import time

import pytest
import vlcache

from models.shapes_vlm.questions import draw_samples
from tests.integration.running_stack import RunningStack

LONG = vlcache.Sampling(max_new_tokens=2000, ignore_eos=True)
STAGES = (vlcache.Started, vlcache.Delta, vlcache.Compressed, vlcache.Transferred)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_leaving_after_an_event_frees_everything(stack: RunningStack, stage: type) -> None:
    with stack.client() as client, client.stream("Go on", sampling=LONG) as stream:
        for event in stream:
            if isinstance(event, stage):
                break
    stack.wait_idle()


def test_a_deadline_at_any_moment_frees_everything(stack: RunningStack) -> None:
    sample = next(iter(draw_samples(seed=990_004, count=1)))
    for total_s in (0.001, 0.01, 0.03, 0.1, 0.2, 0.4):
        timeout = vlcache.Timeout(total_s=total_s)
        with vlcache.Client(stack.address, timeout=timeout) as client, pytest.raises(vlcache.DeadlineExceeded):
            client.generate(sample.question, images=sample.images, sampling=LONG)
    stack.wait_idle()


def test_a_crowd_that_leaves_at_random(stack: RunningStack) -> None:
    sample = next(iter(draw_samples(seed=990_005, count=1)))
    chance = random.Random(5)
    threads = [threading.Thread(target=_ask_and_leave, args=(stack, sample, chance.random())) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stack.wait_idle()


def _ask_and_leave(stack: RunningStack, sample: object, patience_s: float) -> None:
    with stack.client() as client, client.stream(sample.question, images=sample.images, sampling=LONG) as stream:
        leave = threading.Timer(patience_s, stream.close)
        leave.start()
        try:
            for _ in stream:
                time.sleep(0)
        except vlcache.VlcacheError:
            pass
        leave.join()
