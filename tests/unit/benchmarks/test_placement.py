"""The simulation of placement: its books balance, its seed decides everything, and what it says is what happens."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.picture import picture
from benchmarks.placement import __main__ as command
from benchmarks.placement.config import PlacementConfig
from benchmarks.placement.decisions import COUNTS
from benchmarks.placement.figures import cases, figures, quantile
from benchmarks.placement.newcomer import newcomers
from benchmarks.placement.servers import DecodeServer, PrefillServer
from benchmarks.placement.simulation import CLAIRVOYANT, CONTENDERS, Simulation
from benchmarks.placement.trace import TOKENS_PER_IMAGE, Request, Trace, make_trace
from benchmarks.report import environment
from router.placement.catalogue import POLICIES

SMALL = PlacementConfig(workers=6, requests=150, routers=(1, 2), images=50)


def simulated(config: PlacementConfig, contender: str, routers: int = 1, **settings: float) -> Simulation:
    run = Simulation(config, make_trace(config), contender, routers, **settings)
    run.run()
    return run


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("load", [0.3, 0.95])
def test_every_request_ends_once_and_leaves_nothing(contender: str, load: float) -> None:
    config = dataclasses.replace(SMALL, load=load, decode_load=load)
    run = simulated(config, contender, routers=3)
    run.check_integrity()
    for number, request in enumerate(make_trace(config).requests):
        outcome = run.outcomes[number]
        assert outcome.queue_s >= 0
        assert outcome.placed_s >= request.at_s
        assert outcome.first_token_s > outcome.queue_s


@pytest.mark.parametrize("contender", CONTENDERS)
def test_a_prefill_worker_computes_one_prompt_at_a_time(contender: str) -> None:
    run, trace = simulated(SMALL, contender), make_trace(SMALL)
    for number in range(SMALL.workers):
        own = [(trace.requests[each], outcome) for each, outcome in run.outcomes.items() if outcome.prefill == number]
        spans = sorted((asked.at_s + each.queue_s, asked.at_s + each.first_token_s) for asked, each in own)
        assert all(end <= begin + 1e-9 for (_, end), (begin, _) in itertools.pairwise(spans))
        assert sum(end - begin for begin, end in spans) == pytest.approx(run.prefill[number].busy_s)


@pytest.mark.parametrize("contender", CONTENDERS)
def test_the_seed_decides_everything(contender: str) -> None:
    first, second = (figures(contender, 2, simulated(SMALL, contender, routers=2)) for _ in range(2))
    assert first == second
    other = figures(contender, 2, simulated(dataclasses.replace(SMALL, seed=2), contender, routers=2))
    assert other != first


def test_a_trace_has_the_load_that_was_asked_for() -> None:
    config = PlacementConfig(workers=20, requests=5000, load=0.6)
    trace = make_trace(config)
    requests = trace.requests
    assert [request.at_s for request in requests] == sorted(request.at_s for request in requests)
    work = sum(request.prompt_tokens for request in requests) / requests[-1].at_s
    assert work / sum(trace.prefill_tokens_per_s) == pytest.approx(0.6, rel=0.25)
    asked = Counter(image for request in requests for image in request.images)
    most = [count for _, count in asked.most_common()]
    # the share of the most popular one of 5000 is log(2) / log(5001)
    assert most[0] / sum(most) == pytest.approx(0.081, rel=0.15)
    assert set(asked) <= set(range(config.images))
    sizes = sorted(request.prompt_tokens for request in requests)
    assert sizes[-1] > 5 * sizes[len(sizes) // 2]


def test_a_remembered_image_saves_its_share_until_others_take_its_place() -> None:
    server = PrefillServer(1000.0, cached_images=1, hit_saves=0.5)

    def asks(image: int, at_s: float) -> float:
        request = Request(at_s=at_s, router=0, images=(image,), text_tokens=24, new_tokens=1)
        begin_s, end_s = server.admit(request, at_s)
        return round(1000 * (end_s - begin_s))

    full, saved = TOKENS_PER_IMAGE + 24, TOKENS_PER_IMAGE // 2 + 24
    assert [asks(1, 0.0), asks(1, 10.0), asks(2, 20.0), asks(1, 30.0)] == [full, saved, full, full]
    assert (server.hits, server.lookups) == (1, 4)


def test_a_pool_gives_what_it_has() -> None:
    request = Request(at_s=0.0, router=0, images=(), text_tokens=100, new_tokens=40)
    server = DecodeServer(1.0, 2 * request.kv_tokens)
    empty_s = server.answer_s(request)
    assert [server.reserve(request) for _ in range(3)] == [True, True, False]
    assert server.answer_s(request) == pytest.approx(3 * empty_s)
    server.release(request)
    assert server.reserve(request)


def test_one_router_that_is_told_everything_beats_chance() -> None:
    config = PlacementConfig(workers=20, requests=2000, routers=(1,))
    rows = {name: figures(name, 1, simulated(config, name)) for name in ("random", "least_loaded", CLAIRVOYANT)}
    ends = [rows[name]["ttft_p99_s"] for name in (CLAIRVOYANT, "least_loaded", "random")]
    assert ends == sorted(ends)
    assert rows["random"]["queue_p99_s"] > 2 * rows["least_loaded"]["queue_p99_s"]


def test_affinity_finds_more_images_again() -> None:
    config = PlacementConfig(workers=20, requests=2000, routers=(1,), images=500, cached_images=20, load=0.5)
    rows = {name: figures(name, 1, simulated(config, name)) for name in ("least_loaded", "image_affinity")}
    assert rows["image_affinity"]["hit_rate"] > rows["least_loaded"]["hit_rate"] + 0.05


def test_a_newcomer_is_sent_less_at_first_when_it_starts_slowly() -> None:
    config = PlacementConfig(workers=10, requests=2000, routers=(8,), slow_starts_s=(0.0, 10.0))
    asked: list[int] = []
    at_once, slowly = newcomers(config, make_trace(config), lambda: asked.append(1))
    assert (at_once["slow_start_s"], slowly["slow_start_s"]) == (0.0, 10.0)
    assert slowly["newcomer_queue_p99_s"] < at_once["newcomer_queue_p99_s"]
    assert len(asked) == 2 * config.requests


def test_nobody_is_sent_to_a_newcomer_before_it_comes() -> None:
    middle_s = make_trace(SMALL).requests[75].at_s
    run = simulated(SMALL, "least_loaded", newcomer_at_s=middle_s)
    run.check_integrity()
    assert min(outcome.placed_s for outcome in run.outcomes.values() if outcome.prefill == 0) >= middle_s


def test_quantiles_are_values() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([1.0, 2.0], 0.99) == 2.0


def test_the_command_prints_what_it_writes(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.placement.decisions.DECISIONS", 3)
    target = tmp_path / "placement.json"
    command.main(["--workers", "4", "--requests", "40", "--routers", "1", "2", "--json", str(target)])
    found = json.loads(target.read_text())
    assert found["benchmark"] == "placement"
    assert found["workload"]["workers"] == 4
    assert {"commit", "cpu", "versions"} <= set(found["environment"])
    assert [(row["policy"], row["routers"]) for row in found["results"]] == cases(
        PlacementConfig(workers=4, requests=40, routers=(1, 2))
    )
    assert {name: set(by) for name, by in found["decision_us"].items()} == {
        name: {str(count) for count in COUNTS} for name in POLICIES
    }
    printed = capsys.readouterr().out
    for row in found["results"]:
        assert f"| {row['policy']} | {row['routers']} | {row['queue_p50_s']:.3f} |" in printed


@pytest.mark.parametrize(
    "wrong",
    [
        {"workers": 0},
        {"requests": 0},
        {"routers": ()},
        {"routers": (0,)},
        {"load": 1.0},
        {"decode_load": 0.0},
        {"hit_saves": 1.0},
        {"poll_interval_s": 0.0},
        {"slow_starts_s": (-1.0,)},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PlacementConfig(**wrong)


def test_a_trace_is_the_same_for_everybody() -> None:
    one, other = make_trace(SMALL), make_trace(SMALL)
    assert isinstance(one, Trace)
    assert one == other


def test_the_picture_has_a_bar_per_policy_and_count_of_routers() -> None:
    found = {"benchmark": "placement", "workload": dataclasses.asdict(SMALL), "environment": environment()}
    rows = [figures(name, routers, simulated(SMALL, name, routers)) for name, routers in cases(SMALL)]
    drawn = picture({**found, "results": rows})
    root = ElementTree.fromstring(drawn)
    shown = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"1 router", "2 routers"} <= set(shown)
    for row in rows:
        blind = row["policy"] in ("random", "round_robin")
        assert (row["policy"] in shown) != blind
        assert blind or f"{row['ttft_p50_s']:.2f}" in shown
