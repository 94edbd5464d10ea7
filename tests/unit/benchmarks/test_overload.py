"""The overload benchmark against a real router and workers without a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.overload.__main__ import main
from benchmarks.overload.config import OverloadConfig
from benchmarks.overload.measure import Run
from benchmarks.overload.watch import Moment, growth_mib, rss_mib
from deploy.local.stack import Modules
from tests.unit.router.fakes import bench, run, say
from tests.unit.router.test_failures import full

FAKES = Modules(prefill="tests.unit.deploy.fake_worker", decode="tests.unit.deploy.fake_worker", imported=())
SMALL = {"minutes": 0.02, "clients": 2, "prompts": 3, "max_new_tokens": 3, "tasks": ("read",)}


def moment(at_s: float, **rss: float) -> Moment:
    return Moment(at_s=at_s, waiting=0, rss_mib=rss)


def test_memory_of_children_counts() -> None:
    code = "import numpy; block = numpy.ones(10 << 20); print('up', flush=True); input()"
    own = rss_mib(os.getpid())
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        alone = rss_mib(child.pid)
        assert alone > 80
        assert rss_mib(os.getpid()) > own + alone / 2
        child.communicate("")
    assert rss_mib(child.pid) == 0


def test_growth_is_that_of_the_last_quarter_over_the_second() -> None:
    warming = [moment(second, router=100 + second, decode=50) for second in range(8)]
    assert growth_mib(warming) == {"router": 6.5 - 2.5, "decode": 0}
    assert growth_mib(warming[:3]) == {}


@pytest.mark.parametrize("wrong", [{"rate": 1.0}, {"minutes": 0}, {"retention": 0}, {"tasks": ()}, {"goodput": ("x",)}])
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)) if "goodput" not in wrong else "ttft"):
        OverloadConfig(**wrong)


def test_a_stack_of_its_own_is_overloaded_and_reported(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--minutes", "0.05", "--clients", "2", "--prompts", "3", "--max-new-tokens", "3", "--tasks", "read"]
    assert main([*flags, "--json", "-"], modules=FAKES) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    capacity, exact, over = found["results"]
    assert (capacity["load"], exact["load"], over["load"]) == ("capacity", "at capacity", "overload")
    assert found["capacity_requests_per_s"] == capacity["request_throughput"] > 0
    assert over["offered_requests_per_s"] == pytest.approx(1.2 * exact["offered_requests_per_s"])
    assert over["completed"] + over["failed"] == pytest.approx(3 * over["offered_requests_per_s"], abs=1)
    assert found["only_exhausted"]
    assert set(over["curve"][-1]["rss_mib"]) == {"router", "prefill-0", "decode-0"}
    assert all(mib > 10 for mib in over["curve"][-1]["rss_mib"].values())


def test_refusals_are_counted_by_what_clients_were_told() -> None:
    async def scenario() -> None:
        async with bench(max_waiting=0) as service:
            config = OverloadConfig(**SMALL)
            router = service.router
            measured = Run(config, router.address, router.metrics_address, {"me": os.getpid()})
            service.decode[0].admit = full
            row = await measured._open_loop("overload", 100.0, 0.1)
            assert row["refused"] == {"RESOURCE_EXHAUSTED QUEUE_FULL": 10}
            assert row["failed_by_code"] == {"RESOURCE_EXHAUSTED": 10}
            assert row["retry_after_s"]["least"] >= 0.5
            service.decode[0].admit = lambda _: None
            service.decode[0].script = say("B", "C")
            assert (await measured._open_loop("again", 100.0, 0.1))["refused"] == {}

    run(scenario)


def test_the_queue_is_watched() -> None:
    async def scenario() -> None:
        async with bench() as service:
            service.decode[0].admit = full
            call = service.ask()
            await service.becomes_waiting(1)
            router = service.router
            measured = Run(OverloadConfig(**SMALL), router.address, router.metrics_address, {})
            async with measured._watched(1.0) as moments:
                while not moments:
                    await service.decode[0].reserves.reaches(len(service.decode[0].reserves) + 1)
            assert moments[0].waiting == 1
            call.cancel()

    run(scenario)
