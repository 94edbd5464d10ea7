"""Figures of hand-made streams whose timings are known."""

from __future__ import annotations

import itertools

import pytest
import vlcache

from benchmarks.serve.figures import NO_TOKENS, OK, Outcome, figures, meets, parse_objectives


def answered(*arrivals_s: float, **more: int) -> Outcome:
    return Outcome(code=OK, input_tokens=100, arrivals_s=arrivals_s, **more)


def completion(arrivals_s: tuple[float, ...]) -> vlcache.Completion:
    """What the client makes of tokens that arrive at these times."""
    timings = vlcache.Timings(
        ttft_s=arrivals_s[0] if arrivals_s else None,
        ttst_s=arrivals_s[1] if len(arrivals_s) > 1 else None,
        itl_s=tuple(later - earlier for earlier, later in itertools.pairwise(arrivals_s)),
        e2e_s=arrivals_s[-1] if arrivals_s else 9.0,
    )
    compressed = vlcache.Compressed(
        policy="vl_cache",
        asked_retention=0.1,
        requested_retention=0.1,
        realised_retention=0.1,
        full_bytes=1000,
        kept_bytes=100,
        layer_tokens=(),
        layer_attention_mass=(),
        prompt_tokens=50,
        visual_tokens=40,
    )
    return vlcache.Completion(
        request_id="r",
        model="m",
        text="",
        token_ids=tuple(range(len(arrivals_s))),
        finish_reason=vlcache.FinishReason.LENGTH,
        usage=vlcache.Usage(prompt_tokens=50, visual_tokens=40, generated_tokens=len(arrivals_s)),
        compression=compressed,
        transfer=vlcache.Transferred(transport="memory", sent_bytes=120, seconds=0.1),
        timings=timings,
        seed=0,
        placement=vlcache.Placement(prefill_worker="p", decode_worker="d"),
    )


def test_latencies_of_one_stream() -> None:
    stream = answered(0.5, 0.7, 0.8, 1.1)
    assert stream.ttft_s == 0.5
    assert stream.e2el_s == 1.1
    assert stream.itl_s == pytest.approx([0.2, 0.1, 0.3])
    assert stream.tpot_s == pytest.approx((1.1 - 0.5) / 3)


def test_an_answer_of_one_token_has_no_gaps_and_a_tpot_of_zero() -> None:
    assert answered(0.5).itl_s == []
    assert answered(0.5).tpot_s == 0


def test_a_completion_gives_back_the_arrivals_it_was_timed_by() -> None:
    outcome = Outcome.of(completion((0.25, 0.75, 1.0)))
    assert outcome == Outcome(
        code=OK,
        input_tokens=50,
        arrivals_s=(0.25, 0.75, 1.0),
        kv_full_bytes=1000,
        kv_kept_bytes=100,
        kv_sent_bytes=120,
    )


def test_a_completion_without_tokens_is_a_failure() -> None:
    assert Outcome.of(completion(())) == Outcome(code=NO_TOKENS)


def test_figures_of_three_streams_and_two_failures() -> None:
    outcomes = [
        answered(0.1, 0.2, 0.4, kv_full_bytes=1000, kv_kept_bytes=100, kv_sent_bytes=120),
        answered(0.3, 0.4, kv_full_bytes=2000, kv_kept_bytes=200, kv_sent_bytes=220),
        answered(0.8),
        Outcome(code="RESOURCE_EXHAUSTED", input_tokens=7, kv_full_bytes=1),
        Outcome(code="UNAVAILABLE"),
    ]
    found = figures(outcomes, duration_s=2.0, limits_s={"ttft": 0.3, "e2el": 0.5})
    assert found["duration"] == 2.0
    assert (found["completed"], found["failed"]) == (3, 2)
    assert found["failed_by_code"] == {"RESOURCE_EXHAUSTED": 1, "UNAVAILABLE": 1}
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (300, 6)
    assert (found["request_throughput"], found["request_goodput"]) == (1.5, 1.0)
    assert (found["output_throughput"], found["total_token_throughput"]) == (3.0, 153.0)
    assert found["mean_ttft_ms"] == pytest.approx(400)
    assert found["median_ttft_ms"] == pytest.approx(300)
    # between the 2nd and the 3rd of three values, 98 % of the way
    assert found["p99_ttft_ms"] == pytest.approx(300 + 0.98 * 500)
    # deviations -300, -100, 400 from the mean
    assert found["std_ttft_ms"] == pytest.approx((260_000 / 3) ** 0.5)
    assert found["mean_ttst_ms"] == pytest.approx(300), "the stream of one token has no second"
    assert found["mean_tpot_ms"] == pytest.approx((150 + 100) / 2)
    assert found["mean_itl_ms"] == pytest.approx((100 + 200 + 100) / 3)
    assert found["mean_e2el_ms"] == pytest.approx((400 + 400 + 800) / 3)
    assert (found["kv_full_bytes"], found["kv_kept_bytes"], found["kv_sent_bytes"]) == (3000, 300, 340)
    assert found["kv_saved_bytes"] == 2700


def test_the_keys_are_those_of_vllm() -> None:
    found = figures([answered(0.1, 0.2)], duration_s=1.0, limits_s={})
    latencies = {
        f"{statistic}_{name}_ms"
        for statistic in ("mean", "median", "std", "p99")
        for name in ("ttft", "tpot", "itl", "e2el")
    }
    assert latencies <= set(found)
    assert found["request_goodput"] is None, "vLLM reports none without objectives"


def test_nothing_observed_is_none_and_not_zero() -> None:
    found = figures([Outcome(code="UNAVAILABLE")], duration_s=1.0, limits_s={"ttft": 1.0})
    assert found["median_ttft_ms"] is None
    assert found["p99_itl_ms"] is None
    assert (found["completed"], found["request_goodput"], found["output_throughput"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("limits_s", "good"),
    [
        ({}, True),
        ({"ttft": 0.5}, True),
        ({"ttft": 0.49}, False),
        ({"tpot": 0.25}, True),
        ({"tpot": 0.24}, False),
        ({"e2el": 1.0}, True),
        ({"e2el": 0.99}, False),
        ({"ttft": 0.5, "tpot": 0.25, "e2el": 0.9}, False),
    ],
)
def test_a_request_is_good_within_every_limit_the_limit_included(limits_s: dict[str, float], good: bool) -> None:
    assert meets(answered(0.5, 0.75, 1.0), limits_s) is good


def test_a_failed_request_is_never_good() -> None:
    assert not meets(Outcome(code="CANCELLED", arrivals_s=(0.1,)), {})


def test_objectives_are_given_in_milliseconds() -> None:
    assert parse_objectives(["ttft:500", "tpot:37.5", "e2el:2000"]) == {"ttft": 0.5, "tpot": 0.0375, "e2el": 2.0}


@pytest.mark.parametrize("words", [["itl:5"], ["ttft"], ["ttft:"], ["ttft:x"], ["ttft:0"], ["ttft:-1"], ["tpot:nan"]])
def test_what_is_no_objective_is_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match=words[0]):
        parse_objectives(words)


def test_an_objective_may_come_once() -> None:
    with pytest.raises(ValueError, match="at most once"):
        parse_objectives(["ttft:500", "ttft:600"])
