"""The figures of the demonstration."""

from __future__ import annotations

import pytest
from vlcache import Completion, Compressed, FinishReason, Placement, Timings, Transferred, Usage

from deploy.local.report import Result, Sample, Summary, to_document

SAMPLE = Sample(images=("a.png",), question="what?", answer="AB", task="read")


WIRE = Transferred(transport="grpc", sent_bytes=1000, seconds=0.1)
ONE_PROCESS = Transferred(transport="local", sent_bytes=0, seconds=0.1)


def completion(
    text: str = "AB", *, sent: Transferred | None = WIRE, itl_s: tuple[float, ...] = (0.02, 0.04)
) -> Completion:
    return Completion(
        request_id="r",
        model="toy",
        text=text,
        token_ids=(1, 2, 3),
        finish_reason=FinishReason.STOP,
        usage=Usage(prompt_tokens=50, visual_tokens=40, generated_tokens=3),
        compression=Compressed(
            policy="vl_cache",
            asked_retention=0.1,
            requested_retention=0.1,
            realised_retention=0.098,
            full_bytes=10_000,
            kept_bytes=980,
            layer_tokens=(5,),
            layer_attention_mass=(0.9,),
            prompt_tokens=50,
            visual_tokens=40,
        ),
        transfer=sent,
        timings=Timings(ttft_s=0.5, ttst_s=0.6 if itl_s else None, itl_s=itl_s, e2e_s=0.7),
        seed=0,
        placement=Placement(prefill_worker="p", decode_worker="d"),
    )


@pytest.mark.parametrize(("text", "right"), [("AB", True), (" AB\n", True), ("ab", False), ("ABC", False), ("", False)])
def test_only_the_exact_answer_is_right(text: str, right: bool) -> None:
    assert Result.of(SAMPLE, completion(text)).right is right


def test_an_answer_of_one_token_sent_nothing_and_has_no_gaps() -> None:
    result = Result.of(SAMPLE, completion(sent=None, itl_s=()))
    assert (result.kv_sent_bytes, result.itl_s, result.ttst_s) == (0, None, None)
    text = "\n".join(result.lines())
    assert "nothing sent" in text
    assert "TTST -, mean ITL -" in text


def test_columns_are_aligned() -> None:
    lines = Result.of(SAMPLE, completion()).lines()
    assert {line.index(line.split()[1]) for line in lines} == {17}


def test_the_summary_compares_what_travelled_with_what_would_have() -> None:
    results = [Result.of(SAMPLE, completion()), Result.of(SAMPLE, completion("no", sent=None, itl_s=()))]
    summary = Summary.of(results, questions=3)
    # the second answer sent nothing: its full size must not flatter the factor
    assert (summary.kv_full_bytes, summary.kv_kept_bytes) == (10_000, 980)
    assert (summary.kv_sent_bytes, summary.saved_factor) == (1000, 10.0)
    assert (summary.questions, summary.answered, summary.right) == (3, 2, 1)
    assert summary.itl_s == pytest.approx(0.03)
    assert summary.ttst_s == pytest.approx(0.6)
    assert "1 of 3 right" in summary.line()
    assert "10.0 times less" in summary.line()


def test_inside_one_process_nothing_is_sent_but_much_is_saved() -> None:
    result = Result.of(SAMPLE, completion(sent=ONE_PROCESS))
    assert "9.8 KiB full, 980 B kept (9.8 % by vl_cache), 0 B sent via local" in "\n".join(result.lines())
    summary = Summary.of([result], questions=1)
    assert (summary.kv_full_bytes, summary.kv_kept_bytes, summary.kv_sent_bytes) == (10_000, 980, 0)
    assert summary.saved_factor is None
    assert "KV 9.8 KiB full, 980 B kept, 0 B sent | mean" in summary.line()


def test_a_summary_of_nothing_is_still_a_line() -> None:
    summary = Summary.of([], questions=0)
    assert summary.saved_factor is None
    assert "TTFT -" in summary.line()


def test_the_document_keeps_every_figure() -> None:
    results = [Result.of(SAMPLE, completion())]
    document = to_document(results, Summary.of(results, questions=1))
    (question,) = document["questions"]
    assert (question["retention"], question["transport"]) == (0.098, "grpc")
    assert document["summary"]["saved_factor"] == 10.0
