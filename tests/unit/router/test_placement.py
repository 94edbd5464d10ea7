"""The choice of a pair: what all policies have in common, and what each of them is for."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vlcache.v1 import inference_pb2 as pb
from vlcache.worker.v1 import worker_pb2

from router.config import RouterConfig
from router.placement import cheapest, cost, image_affinity
from router.placement.base import Demand, Group, Pair, Placement
from router.placement.catalogue import POLICIES
from router.placement.cheapest import pairs_of
from router.placement.cost import IN_MEMORY_S, decode_cost, prefill_cost
from router.placement.groups import groups_by_model
from router.placement.image_affinity import ImageAffinity, affinity
from router.placement.least_loaded import LeastLoaded
from router.placement.power_of_two import MAX_DRAWS, PowerOfTwo
from router.placement.round_robin import RoundRobin
from router.validation import accept
from router.workers.slow_start import SlowStart
from router.workers.worker import CALLS, READY, UNREACHABLE, Worker
from shared.command_line import parse_config
from shared.errors import InternalError, ResourceExhaustedError, ServiceError, TooLargeError
from tests.unit.router.fakes import FakeDecode, FakePrefill, bench, first_token, run, served_model
from tests.unit.router.fleet import Clock, decode, demand, group_of, names, prefill, worker


def first(policy: Placement, groups: Sequence[Group], asked: Demand | None = None) -> Pair:
    return next(policy.order(groups, asked or demand()))


def place(policy: Placement, groups: Sequence[Group], asked: Demand) -> Pair:
    """Places a request for ever."""
    pair = first(policy, groups, asked)
    pair.prefill.charge(asked.prompt_tokens)
    pair.decode.charge(asked.kv_tokens * pair.decode.token_bytes)
    return pair


def cost_of(pair: Pair, asked: Demand) -> float:
    price = prefill_cost(pair.prefill, asked) + decode_cost(pair.decode, asked)
    return price - IN_MEMORY_S * pair.in_memory


def break_circuit(one: Worker) -> None:
    for call in CALLS[one.info.role]:
        for _ in range(5):
            one.charge(0).failed(call, InternalError("broken"))


loads = st.lists(
    st.tuples(st.integers(0, 5000), st.sampled_from(["a", "b", "c"]), st.sampled_from(["ready", "gone", "broken"])),
    max_size=5,
)


@st.composite
def fleets(draw: st.DrawFn) -> list[Group]:
    groups = []
    for _ in range(draw(st.integers(0, 2))):
        members: tuple[list[Worker], list[Worker]] = ([], [])
        for role, into in zip(("prefill", "decode"), members, strict=True):
            for load, host, fate in draw(loads):
                one = worker(role, f"{role}-{len(groups)}-{len(into)}", host=host)
                one.charge(load)
                if fate == "broken":
                    break_circuit(one)
                one.state = UNREACHABLE if fate == "gone" else READY
                into.append(one)
        if all(members):
            groups.append(Group(*members))
    return groups


@pytest.mark.parametrize("name", POLICIES)
@given(groups=fleets(), image=st.none() | st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_every_ready_pair_comes_once_and_no_other(name: str, groups: list[Group], image: int | None) -> None:
    order = list(POLICIES[name](Random(3)).order(groups, demand(image=image)))
    wanted = {Pair(one, other) for group in groups for one in group.prefill for other in group.decode}
    assert Counter(order) == Counter(pair for pair in wanted if pair.ready)


@given(groups=fleets())
@settings(deadline=None)
def test_least_loaded_is_the_order_of_all_pairs_by_cost(groups: list[Group]) -> None:
    found = [cost_of(pair, demand()) for pair in LeastLoaded(Random(3)).order(groups, demand())]
    assert found == pytest.approx(sorted(found))


@given(groups=fleets(), index=st.integers(0, 4))
@settings(deadline=None)
def test_a_settled_prefill_worker_is_paired_by_cost_whether_it_is_ready_or_not(groups: list[Group], index: int) -> None:
    for group in groups:
        settled = group.prefill[index % len(group.prefill)]
        pairs = list(pairs_of(settled, group.decode, demand()))
        assert {pair.decode for pair in pairs} == {one for one in group.decode if one.ready}
        found = [cost_of(pair, demand()) for pair in pairs]
        assert found == pytest.approx(sorted(found))


@pytest.mark.parametrize("name", POLICIES)
def test_nobody_starves(name: str) -> None:
    """Requests without end, some of them about an image, reach every worker."""
    group, chance, policy = group_of(6, 6), Random(1), POLICIES[name](Random(3))
    reached: Counter[str] = Counter()
    for _ in range(300):
        image = chance.choice([None, chance.getrandbits(64)])
        reached.update(names(place(policy, [group], demand(image=image))))
    assert len(reached) == 12
    assert min(reached.values()) >= 300 / 6 / 3


@pytest.mark.parametrize("name", ["round_robin", "least_loaded"])
def test_equals_take_turns(name: str) -> None:
    group = group_of(2, 3)
    seen = []
    for _ in range(6):
        pair = first(POLICIES[name](Random(3)), [group])
        for one in (pair.prefill, pair.decode):
            one.charge(100).end()
        seen.append(names(pair))
    assert [one for one, _ in seen] == ["p0", "p1"] * 3
    assert [one for _, one in seen] == ["d0", "d1", "d2"] * 2


def test_round_robin_is_blind() -> None:
    group = group_of(2, 2)
    group.prefill[0].charge(10**6)
    assert [names(place(RoundRobin(Random(3)), [group], demand()))[0] for _ in range(4)] == ["p1", "p0", "p1", "p0"]


def test_a_burst_spreads_before_any_worker_has_reported() -> None:
    group = group_of(4, 2)
    for _ in range(8):
        place(LeastLoaded(Random(3)), [group], demand())
    assert {one.load for one in group.prefill} == {200}
    assert len({one.load for one in group.decode}) == 1


def test_a_fast_worker_may_have_a_longer_queue() -> None:
    group = group_of(2, 1)
    slow, fast = group.prefill
    slow.speed.observe(1000, 1.0)
    fast.speed.observe(4000, 1.0)
    taken = Counter(names(place(LeastLoaded(Random(3)), [group], demand(kv_tokens=0)))[0] for _ in range(100))
    assert taken == {"p0": 20, "p1": 80}


def test_a_large_pool_may_hold_more() -> None:
    small, large = decode(2)
    large.capacity = 3 * small.capacity
    group = Group(prefill(1), [small, large])
    taken = Counter(names(place(LeastLoaded(Random(3)), [group], demand(prompt_tokens=0)))[1] for _ in range(100))
    assert taken == {"d0": 25, "d1": 75}


def test_roles_are_scored_together() -> None:
    """A prefill worker next to a full pool is worth less than its queue alone would say."""
    near, far = Group(prefill(1, host="near"), decode(1, host="near")), group_of(1, 1)
    near.decode[0].charge(near.decode[0].capacity)
    far.prefill[0].charge(1000)
    # half a second of queue against a full pool
    assert first(LeastLoaded(Random(3)), [near, far]).prefill is far.prefill[0]
    far.prefill[0].charge(2000)
    assert first(LeastLoaded(Random(3)), [near, far]).prefill is near.prefill[0]


@pytest.mark.parametrize("name", ["least_loaded", "power_of_two", "image_affinity"])
@pytest.mark.parametrize(("ahead_s", "together"), [(0.9 * IN_MEMORY_S, True), (1.1 * IN_MEMORY_S, False)])
def test_a_common_host_decides_within_its_worth_only(name: str, ahead_s: float, together: bool) -> None:
    here = worker("prefill", "p", host="one")
    near, other = worker("decode", "near", host="one"), worker("decode", "other", host="two")
    near.charge(round(ahead_s / cost.FULL_POOL_S * near.capacity))
    policy = POLICIES[name](Random(3))
    chosen = [first(policy, [Group([here], [near, other])], demand(image=7)) for _ in range(20)]
    better = near if together else other
    # two draws may both have met the same worker
    assert Counter(pair.decode for pair in chosen).most_common(1)[0][0] is better
    assert name == "power_of_two" or {pair.decode for pair in chosen} == {better}


def test_what_reservations_are_answered_corrects_what_addresses_suggest() -> None:
    here, there = worker("prefill", "p", host="one"), worker("prefill", "q", host="two")
    near, far = worker("decode", "d", host="one"), worker("decode", "e", host="three")
    assert Pair(here, near).in_memory
    assert not Pair(worker("prefill", "without", host="one", arena_socket=""), near).in_memory
    assert not Pair(there, far).in_memory
    # one host, but no common socket directory
    Pair(here, near).learn("grpc")
    assert not Pair(here, near).in_memory
    # two addresses of one host
    Pair(there, far).learn("memory")
    assert Pair(there, far).in_memory
    Pair(here, far).learn("grpc")
    Pair(here, far).learn("local")
    assert Pair(here, far).in_memory


def test_routers_that_know_the_same_do_not_do_the_same_and_one_alone_is_exact() -> None:
    alone, shared = group_of(8, 1), group_of(8, 1)
    for number, (own, others) in enumerate(zip(alone.prefill, shared.prefill, strict=True)):
        own.charge(1000 + number)
        others.observe(report_of(others, outstanding_tokens=1000 + number))
    policy, asked = LeastLoaded(Random(3)), demand()
    assert {first(policy, [alone], asked).prefill for _ in range(50)} == {alone.prefill[0]}
    assert {first(policy, [shared], asked).prefill for _ in range(200)} == set(shared.prefill)
    # nobody is taken who would cost more than half of the request's own time
    late = shared.prefill[1]
    late.observe(report_of(late, outstanding_tokens=1051))
    assert late not in {first(policy, [shared], asked).prefill for _ in range(200)}


def report_of(one: Worker, *, outstanding_tokens: int) -> worker_pb2.WorkerInfo:
    said = worker_pb2.WorkerInfo()
    said.CopyFrom(one.info)
    said.outstanding_tokens = outstanding_tokens
    return said


def test_power_of_two_takes_the_better_one_of_those_it_draws() -> None:
    group = group_of(2, 1)
    group.prefill[0].charge(100_000)
    policy = PowerOfTwo(Random(5))
    taken = Counter(names(first(policy, [group]))[0] for _ in range(400))
    # the loaded one comes only when both draws meet it
    assert 60 < taken["p0"] < 140


def test_power_of_two_looks_at_a_handful_however_many_there_are() -> None:
    looks = Counter[str]()

    class Counted(Worker):
        @property
        def ready(self) -> bool:
            looks[self.info.role] += 1
            return super().ready

    group = Group(
        [Counted(one.client, one.info) for one in prefill(500)], [Counted(one.client, one.info) for one in decode(500)]
    )
    first(PowerOfTwo(Random(1)), [group])
    assert max(looks.values()) <= 2 * MAX_DRAWS


def test_the_first_pair_never_costs_the_product_of_the_fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    """500 workers of each role on five hosts, or on one: every worker is priced once, few pairs are made."""
    for hosts in (1, 5):
        priced: Counter[str] = Counter()
        made: list[Pair] = []
        count_calls(monkeypatch, priced, made)
        group = Group(
            [worker("prefill", f"p{number}", host=str(number % hosts)) for number in range(500)],
            [worker("decode", f"d{number}", host=str(number % hosts)) for number in range(500)],
        )
        for name in ("least_loaded", "power_of_two", "image_affinity"):
            priced.clear()
            made.clear()
            first(POLICIES[name](Random(3)), [group], demand(image=3))
            assert priced["prefill"] <= 500
            assert priced["decode"] <= 500
            assert len(made) <= 501


def count_calls(monkeypatch: pytest.MonkeyPatch, priced: Counter[str], made: list[Pair]) -> None:
    def priced_prefill(one: Worker, asked: Demand) -> float:
        priced["prefill"] += 1
        return prefill_cost(one, asked)

    def priced_decode(one: Worker, asked: Demand) -> float:
        priced["decode"] += 1
        return decode_cost(one, asked)

    def pair(one: Worker, other: Worker) -> Pair:
        made.append(Pair(one, other))
        return made[-1]

    monkeypatch.setattr(cost, "prefill_cost", priced_prefill)
    monkeypatch.setattr(image_affinity, "prefill_cost", priced_prefill)
    monkeypatch.setattr(cheapest, "decode_cost", priced_decode)
    monkeypatch.setattr(cheapest, "Pair", pair)


@given(images=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=30, unique=True), gone=st.integers(0, 6))
@settings(deadline=None)
def test_a_worker_that_leaves_moves_its_own_images_only(images: list[int], gone: int) -> None:
    group = group_of(7, 1)
    homes = {image: first(ImageAffinity(Random(3)), [group], demand(image=image)).prefill for image in images}
    left = group.prefill[gone]
    rest = Group([one for one in group.prefill if one is not left], group.decode)
    for image, home in homes.items():
        now = first(ImageAffinity(Random(3)), [rest], demand(image=image)).prefill
        assert now is home or home is left
        # another router, with another order of the same workers, says the same
        mirrored = Group(rest.prefill[::-1], rest.decode)
        assert first(ImageAffinity(Random(3)), [mirrored], demand(image=image)).prefill is now


def test_images_are_shared_out_evenly() -> None:
    group, chance = group_of(5, 1), Random(2)
    homes = Counter(
        names(first(ImageAffinity(Random(3)), [group], demand(image=chance.getrandbits(64))))[0] for _ in range(1000)
    )
    assert min(homes.values()) > 150


@given(waiting=st.lists(st.integers(0, 20_000), min_size=2, max_size=8), image=st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_an_overloaded_favourite_is_passed_over(waiting: list[int], image: int) -> None:
    group = group_of(len(waiting), 1)
    for one, tokens in zip(group.prefill, waiting, strict=True):
        one.charge(tokens)
    asked = demand(image=image)
    costs = {one: prefill_cost(one, asked) for one in group.prefill}
    # all are equally fast: half of the request's own time
    most = min(costs.values()) + 0.5 * asked.prompt_tokens / group.prefill[0].speed.tokens_per_s
    order = list(dict.fromkeys(pair.prefill for pair in ImageAffinity(Random(3)).order([group], asked)))
    assert costs[order[0]] <= most
    within = [one for one in order if costs[one] <= most]
    assert order == within + [one for one in order if costs[one] > most]
    assert within == sorted(within, key=lambda one: -affinity(one, image))


def test_a_popular_image_does_not_bury_its_worker() -> None:
    group = group_of(10, 1)
    for _ in range(1000):
        place(ImageAffinity(Random(3)), [group], demand(image=1, kv_tokens=0))
    assert max(one.load for one in group.prefill) <= min(one.load for one in group.prefill) + 150


def test_a_newcomer_gets_a_growing_share() -> None:
    clock = Clock()
    shared = {"clock": clock, "slow_start": SlowStart(10.0, clock)}
    old = [worker("prefill", f"p{number}", settings=shared) for number in range(9)]
    clock.now_s += 100
    group = Group([*old, worker("prefill", "new", settings=shared)], decode(1))
    for one in old:
        one.charge(1000)
    shares = []
    for _ in range(3):
        # requests that end at once, in front of a standing queue everywhere else
        taken = [
            first(LeastLoaded(Random(3)), [group], demand(prompt_tokens=300)).prefill.info.name == "new"
            for _ in range(5)
        ]
        shares.append(all(taken))
        clock.now_s += 3
    # 300 tokens of its own at a tenth are 3000; at 0.3 they are 1000, less than the queues of the others
    assert shares == [False, True, True]
    drawn = PowerOfTwo(Random(1))
    clock.now_s = 1100.0 + 5
    half = Counter(names(first(drawn, [group]))[0] == "new" for _ in range(2000))[True]
    clock.now_s += 5
    whole = Counter(names(first(drawn, [group]))[0] == "new" for _ in range(2000))[True]
    assert half == pytest.approx(whole / 2, rel=0.25)


def test_nobody_is_new_to_a_router_that_has_just_started() -> None:
    clock = Clock()
    start = SlowStart(10.0, clock)
    clock.now_s += 9
    assert start.share(clock.now_s) == 1.0
    clock.now_s += 1
    late = clock.now_s
    assert start.share(late) == 0.1
    clock.now_s += 5
    assert start.share(late) == 0.5
    clock.now_s += 5
    assert start.share(late) == 1.0
    assert SlowStart(0.0, clock).share(clock.now_s) == 1.0


def test_groups_are_those_who_can_exchange_kv() -> None:
    everyone = [*prefill(2), *decode(2)]
    other = served_model(compatibility="other")
    alone = worker("prefill", "alone")
    alone.info.model.CopyFrom(other)
    gone = worker("decode", "gone")
    gone.state = UNREACHABLE
    groups = groups_by_model([*everyone, alone, gone])
    assert {model: [(group.prefill, group.decode) for group in found] for model, found in groups.items()} == {
        "toy": [(everyone[:2], everyone[2:])]
    }


def test_workers_with_another_context_are_of_another_group() -> None:
    """The shorter one could not take what the longer one computes."""
    short = worker("prefill", "short")
    short.info.model.CopyFrom(served_model(context_tokens=100))
    [group] = groups_by_model([short, *prefill(1), *decode(1)])["toy"]
    assert [each.info.name for each in group.prefill] == ["p0"]
    assert "toy" not in groups_by_model([short, *decode(1)])


def test_a_model_is_described_by_its_longest_workers() -> None:
    """What a request reserves must be enough wherever it is placed."""

    async def main() -> None:
        models = {name: served_model(context_tokens=tokens) for name, tokens in (("a", 100), ("b", 900), ("c", 300))}
        prefillers = [FakePrefill(f"prefill-{name}", model=model) for name, model in models.items()]
        decoders = [FakeDecode(f"decode-{name}", model=model) for name, model in models.items()]
        async with bench(prefillers, decoders) as b:
            assert len(b.router.table.groups("toy")) == 3
            described = b.router.table.served_models()["toy"]
            assert (described.info.name, described.info.model.context_tokens) == ("prefill-b", 900)

    run(main)


def test_only_compatible_workers_are_paired() -> None:
    async def main() -> None:
        old, new = served_model(compatibility="old"), served_model(compatibility="new")
        prefillers = [FakePrefill("prefill-old", model=old), FakePrefill("prefill-new", model=new)]
        decoders = [FakeDecode("decode-new", model=new), FakeDecode("decode-newer", model=served_model())]
        async with bench(prefillers, decoders) as b:
            [group] = b.router.table.groups("toy")
            assert [names(Pair(*group.prefill, *group.decode))] == [("prefill-new", "decode-new")]
            for _ in range(3):
                placement = (await b.answer())[-1].finished.placement
                assert (placement.prefill_worker, placement.decode_worker) == ("prefill-new", "decode-new")

    run(main)


@pytest.mark.parametrize("name", POLICIES)
def test_concurrent_requests_use_all_workers(name: str) -> None:
    async def main() -> None:
        prefillers = [FakePrefill(f"prefill-{n}") for n in range(2)]
        decoders = [FakeDecode(f"decode-{n}") for n in range(2)]
        async with bench(prefillers, decoders, placement=name) as b:
            together = asyncio.Event()
            for one in prefillers:
                one.script = lambda _: [together.wait(), first_token("A", 1)]
            asked = [asyncio.create_task(b.answer()) for _ in range(8)]
            await b.becomes(lambda: sum(len(one.requests) for one in prefillers) == 8)
            if name != "power_of_two":
                assert [len(one.reserves) for one in decoders] == [4, 4]
                assert [len(one.requests) for one in prefillers] == [4, 4]
            together.set()
            await asyncio.gather(*asked)

    run(main)


def test_a_conversation_about_an_image_stays_with_its_worker() -> None:
    async def main() -> None:
        prefillers = [FakePrefill(f"prefill-{n}") for n in range(4)]
        async with bench(prefillers, placement="image_affinity") as b:
            seen = {(await b.answer(images=1))[-1].finished.placement.prefill_worker for _ in range(6)}
            assert len(seen) == 1

    run(main)


@pytest.mark.parametrize("refusal", [ResourceExhaustedError("full"), TooLargeError("too large")])
def test_decode_workers_that_refuse_are_asked_once_not_once_per_pair(refusal: ServiceError) -> None:
    async def main() -> None:
        prefillers = [FakePrefill(f"prefill-{n}") for n in range(3)]
        decoders = [FakeDecode(f"decode-{n}") for n in range(2)]

        def refuse(_: object) -> None:
            raise refusal

        async with bench(prefillers, decoders, max_waiting=0) as b:
            for one in decoders:
                one.admit = refuse
            with pytest.raises(grpc.aio.AioRpcError):
                await b.answer()
            assert [len(one.reserves) for one in decoders] == [1, 1]

    run(main)


def key_of(*images: bytes, text: str = "what is it?", tenant: str = "one") -> int | None:
    parts = [pb.Part(image=pb.Image(data=data)) for data in images]
    asked = pb.GenerateRequest(messages=[pb.Message(role="user", parts=[*parts, pb.Part(text=text)])])
    return accept(asked, served_model(), tenant=tenant).image_key


def test_requests_about_one_image_have_one_key_whatever_they_ask() -> None:
    assert key_of(b"cat") == key_of(b"cat", text="and what else?") == key_of(b"cat", b"dog")
    assert len({key_of(b"cat"), key_of(b"dog"), key_of(b"dog", b"cat"), key_of(b"cat", tenant="two")}) == 3
    assert key_of() is None


@pytest.mark.parametrize("wrong", [{"placement": "fortune"}, {"slow_start_s": -1.0}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RouterConfig(registry="static://localhost:1", **wrong)


@pytest.mark.parametrize("name", POLICIES)
def test_the_policy_is_named_on_the_command_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["router", "--registry", "static://localhost:1", "--placement", name])
    assert parse_config(RouterConfig, "").placement == name
