"""What a tenant may ask for, against a model that forgets nobody; and what of it reaches clients and workers."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vlcache.v1 import inference_pb2 as pb

from router.admission.tenant_labels import MAX_LABELS, TenantLabels
from router.admission.tenants import DEFAULT_TENANT, Stay, TenantLimits, Tenants, tenant_of
from router.validation import accept
from shared.errors import InvalidRequestError, ResourceExhaustedError, ServiceError
from tests.unit.router.fakes import Bench, ask, bench, forever, kinds, run, served_model
from tests.unit.router.fleet import Clock
from tests.unit.router.test_failures import error_of, full

# powers of two: the model's sums are exact
CONCURRENCY, RATE, BURST = 2, 0.5, 4
LIMITS = TenantLimits(concurrency=CONCURRENCY, rate=RATE, burst=BURST)


def test_a_call_that_names_nobody_is_the_default_tenants() -> None:
    assert tenant_of([("user-agent", "grpc"), ("x", b"y")]) == DEFAULT_TENANT


@pytest.mark.parametrize("name", ["a", "Team-1._", "x" * 64])
def test_a_tenant_is_what_the_metadata_says(name: str) -> None:
    assert tenant_of([("vlcache-tenant", name)]) == name


@pytest.mark.parametrize("names", [[""], ["a b"], ["x" * 65], ["a\n"], ["é"], ["a/b"], [b"a"], ["a", "a"]])
def test_wrong_names_are_refused(names: list[str | bytes]) -> None:
    with pytest.raises(InvalidRequestError, match="vlcache-tenant") as caught:
        tenant_of([("vlcache-tenant", name) for name in names])
    assert caught.value.reason == "BAD_TENANT"


class AnyOrder(RuleBasedStateMachine):
    """Requests of three tenants come and end in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.tenants = Tenants(LIMITS, clock=self.clock)
        self.stays: list[tuple[str, Stay]] = []
        self.tokens: dict[str, float] = {}
        self.filled_s: dict[str, float] = {}

    @rule(name=st.sampled_from("abc"))
    def come(self, name: str) -> None:
        before = self.tokens.get(name, float(BURST))
        tokens = min(BURST, before + (self.clock.now_s - self.filled_s.get(name, self.clock.now_s)) * RATE)
        in_flight = sum(owner == name for owner, _ in self.stays)
        if in_flight == CONCURRENCY:
            with pytest.raises(ResourceExhaustedError, match="in flight"):
                self.tenants.enter(name)
            return
        if tokens < 1:
            with pytest.raises(ResourceExhaustedError, match="per second") as caught:
                self.tenants.enter(name)
            assert caught.value.retry_after_s == (1 - tokens) / RATE
            return
        self.stays.append((name, self.tenants.enter(name)))
        self.tokens[name], self.filled_s[name] = tokens - 1, self.clock.now_s

    @precondition(lambda self: self.stays)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        ended = data.draw(st.sampled_from(self.stays))
        self.stays.remove(ended)
        ended[1].leave()
        ended[1].leave()

    @rule(seconds=st.sampled_from((0.25, 0.5, 2.0, 8.0)))
    def pass_time(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @invariant()
    def books_balance(self) -> None:
        self.tenants.check_integrity(idle=not self.stays)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(rate=st.floats(0.01, 1000), burst=st.integers(1, 50), pause_s=st.floats(0, 0.9))
def test_who_comes_back_when_told_is_let_in_and_a_moment_earlier_is_not(
    rate: float, burst: int, pause_s: float
) -> None:
    clock = Clock()
    tenants = Tenants(TenantLimits(rate=rate, burst=burst), clock=clock)
    for _ in range(burst):
        tenants.enter("a").leave()
    clock.now_s += pause_s / rate
    with pytest.raises(ResourceExhaustedError) as caught:
        tenants.enter("a")
    assert caught.value.retry_after_s is not None
    arrived_s = clock.now_s
    clock.now_s = arrived_s + caught.value.retry_after_s - 0.002
    if clock.now_s > arrived_s:
        with pytest.raises(ResourceExhaustedError):
            tenants.enter("a")
    clock.now_s = arrived_s + caught.value.retry_after_s + 1e-9
    tenants.enter("a").leave()


def remembered(tenants: Tenants) -> int:
    return len(tenants._idle) + len(tenants._busy)


def test_whoever_has_rested_is_forgotten() -> None:
    clock = Clock()
    tenants = Tenants(TenantLimits(rate=1.0, burst=5), clock=clock)
    for number in range(100):
        tenants.enter(f"t{number}").leave()
    assert remembered(tenants) == 100
    clock.now_s += 5.0
    tenants.enter("another")
    assert remembered(tenants) == 1


def test_without_limits_there_is_nothing_to_remember() -> None:
    tenants = Tenants(TenantLimits())
    for number in range(100):
        tenants.enter(f"t{number}").leave()
    assert remembered(tenants) == 0


def test_however_many_names_are_made_up_few_are_remembered() -> None:
    clock = Clock()
    tenants = Tenants(TenantLimits(rate=0.001, burst=1), max_idle=10, clock=clock)
    stay = tenants.enter("busy")
    for number in range(1000):
        tenants.enter(f"t{number}").leave()
        tenants.check_integrity()
    assert remembered(tenants) == 11
    stay.leave()
    # the last ones are those that are remembered
    with pytest.raises(ResourceExhaustedError):
        tenants.enter("t999")


def test_a_refusal_for_want_of_a_place_says_when_the_next_one_is_expected() -> None:
    clock = Clock()
    tenants = Tenants(TenantLimits(concurrency=2), clock=clock)
    tenants.enter("a")
    for _ in range(5):
        stay = tenants.enter("a")
        clock.now_s += 3.0
        stay.leave()
    tenants.enter("a")
    with pytest.raises(ResourceExhaustedError) as caught:
        tenants.enter("a")
    assert caught.value.retry_after_s == pytest.approx(3.0)


def test_labels_are_bounded() -> None:
    labels = TenantLabels()
    values = [labels.of(f"t{number}") for number in range(100)]
    assert values[: MAX_LABELS - 1] == [f"t{number}" for number in range(MAX_LABELS - 1)]
    assert set(values[MAX_LABELS - 1 :]) == {"other"}
    assert labels.of(DEFAULT_TENANT) == DEFAULT_TENANT
    assert labels.of("t3") == "t3"


def test_favourites_of_placement_are_a_tenants_own() -> None:
    keys = {tenant: accept(ask(images=1), served_model(), tenant=tenant).image_key for tenant in ("a", "b")}
    assert keys["a"] != keys["b"]
    assert accept(ask(images=1), served_model(), tenant="a").image_key == keys["a"]


async def refusal(b: Bench, tenant: str) -> ServiceError:
    return await error_of(b, tenant=tenant)


def test_a_tenant_with_too_much_in_flight_is_refused_and_others_are_not() -> None:
    async def main() -> None:
        async with bench(tenant_concurrency=2) as b:
            b.prefill[0].script = lambda _: [forever()]
            running = [b.ask(tenant="a") for _ in range(2)]
            await b.prefill[0].requests.reaches(2)
            error = await refusal(b, "a")
            assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "TENANT_CONCURRENCY")
            assert error.retry_after_s is not None
            other = b.ask(tenant="b")
            await b.prefill[0].requests.reaches(3)
            assert b.metric("tenant_requests_running", tenant="a") == 2
            assert b.metric("tenant_requests_refused_total", tenant="a", reason="TENANT_CONCURRENCY") == 1
            assert b.metric("requests_total", outcome="refused", code="RESOURCE_EXHAUSTED") == 1
            for call in (*running, other):
                call.cancel()
            await b.idle()
            assert b.metric("tenant_requests_running", tenant="a") == 0

    run(main)


def test_requests_that_wait_are_in_flight() -> None:
    async def main() -> None:
        async with bench(tenant_concurrency=1) as b:
            b.decode[0].admit = full
            waiting = b.ask(tenant="a")
            await b.becomes_waiting(1)
            assert b.metric("tenant_requests_waiting", tenant="a") == 1
            assert (await refusal(b, "a")).reason == "TENANT_CONCURRENCY"
            waiting.cancel()
            await b.idle()
            assert b.metric("tenant_requests_waiting", tenant="a") == 0

    run(main)


def test_a_tenant_that_asks_too_often_is_refused_and_wrong_requests_are_free() -> None:
    async def main() -> None:
        async with bench(tenant_rate=0.001, tenant_burst=2) as b:
            for _ in range(5):
                assert (await error_of(b, tenant="a", text=" ")).code == "INVALID_ARGUMENT"
            for _ in range(2):
                assert kinds(await b.answer(tenant="a"))[-1] == "finished"
            error = await refusal(b, "a")
            assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "TENANT_RATE")
            assert error.retry_after_s is not None
            assert 900 < error.retry_after_s <= 1000
            assert kinds(await b.answer(tenant="b"))[-1] == "finished"
            assert b.metric("tenant_generation_tokens_total", tenant="a") == 6
            assert b.metric("tenant_generation_tokens_total", tenant="b") == 3

    run(main)


def test_a_wrong_name_is_an_invalid_request_and_no_worker_hears_of_it() -> None:
    async def main() -> None:
        async with bench() as b:
            error = await refusal(b, "not a name")
            assert (error.code, error.reason) == ("INVALID_ARGUMENT", "BAD_TENANT")
            assert b.decode[0].reserves == []
            assert b.metric("requests_total", outcome="refused", code="INVALID_ARGUMENT") == 1

    run(main)


def test_the_tenant_travels_with_the_prompt() -> None:
    async def main() -> None:
        async with bench() as b:
            await b.answer(tenant="team-a")
            await b.answer()
            assert [request.tenant for request in b.prefill[0].requests] == ["team-a", DEFAULT_TENANT]

    run(main)


def test_a_finished_answer_is_repeated_to_its_own_tenant_only() -> None:
    async def main() -> None:
        async with bench() as b:
            sampling = pb.SamplingParams(seed=1)
            for tenant in ("a", "a", "b"):
                await b.answer(tenant=tenant, request_id="same", sampling=sampling)
            assert [request.tenant for request in b.prefill[0].requests] == ["a", "b"]

    run(main)


def test_a_crowd_of_tenants_has_few_series() -> None:
    async def main() -> None:
        async with bench() as b:
            await asyncio.gather(*(b.answer(tenant=f"t{number}") for number in range(MAX_LABELS + 3)))
            samples = [
                sample.labels["tenant"]
                for family in b.router.metrics.registry.collect()
                for sample in family.samples
                if sample.name == "vlcache_tenant_generation_tokens_total"
            ]
            # nobody was the default one
            assert len(samples) == MAX_LABELS
            assert b.metric("tenant_generation_tokens_total", tenant="other") == 3 * 4

    run(main)
