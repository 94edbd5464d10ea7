"""`vlcache bench`: what it asks, when, what it makes of the answers, and what it prints."""

import asyncio
import dataclasses
import io
import itertools
import json
import math
import random
import signal
import subprocess
import sys

import grpc
import numpy as np
import pytest
from PIL import Image
from vlcache import AsyncClient, Request, RetryPolicy, Sampling, Timings, Unavailable, Usage
from vlcache.bench.figures import METRICS, percentile, result_of
from vlcache.bench.load import Arrivals, Outcome, Run, run_load
from vlcache.bench.png import random_png
from vlcache.bench.workload import Workload
from vlcache.cli import main

from tests.unit.client.echo import EchoService
from tests.unit.client.explain.answers import answer
from tests.unit.client.service import fail, serve, started, whole_answer


def answered(*arrivals_s, prompt_tokens=100):
    """An answer whose tokens came at these times."""
    gaps = tuple(later - earlier for earlier, later in itertools.pairwise(arrivals_s))
    timings = Timings(ttft_s=arrivals_s[0], ttst_s=None, itl_s=gaps, e2e_s=arrivals_s[-1])
    usage = Usage(prompt_tokens=prompt_tokens, visual_tokens=0, generated_tokens=len(arrivals_s))
    return dataclasses.replace(answer(None), timings=timings, usage=usage)


def run_of(*answers, duration_s=2.0):
    outcomes = [Outcome(sent_s=0.1 * at, ended_s=0.1 * at + 0.15, answer=each) for at, each in enumerate(answers)]
    return Run(outcomes=outcomes, duration_s=duration_s)


def test_figures_are_those_of_vllm():
    many = [answered(0.1, 0.2, 0.4), answered(0.3), answered(0.2, 0.3)]
    result = result_of(run_of(*many), percentiles=(90, 99), objectives={})
    ttft, tpot, itl, e2el = [100, 300, 200], [150, 100], [100, 200, 100], [400, 300, 300]
    for name, values in zip(METRICS, (ttft, tpot, itl, e2el), strict=True):
        assert result[f"mean_{name}_ms"] == pytest.approx(np.mean(values))
        assert result[f"median_{name}_ms"] == pytest.approx(np.median(values))
        assert result[f"std_{name}_ms"] == pytest.approx(np.std(values))
        for percent in (90, 99):
            assert result[f"p{percent}_{name}_ms"] == pytest.approx(np.percentile(values, percent))
    assert (result["completed"], result["failed"], result["duration"]) == (3, 0, 2.0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (300, 6)
    assert (result["request_throughput"], result["output_throughput"]) == (1.5, 3.0)
    assert result["total_token_throughput"] == 153
    assert result["request_goodput"] is None
    assert result["max_concurrent_requests"] == 2
    assert (result["kv_full_bytes"], result["kv_kept_bytes"]) == (3 * 2**21, 3 * 2**18)
    assert (result["kv_saved_bytes"], result["kv_sent_bytes"]) == (3 * (2**21 - 2**18), 900_000)
    assert result["kv_retention"] == 0.125


def test_a_good_request_meets_every_objective():
    many = [answered(0.1, 0.2), answered(0.3), answered(0.1, 0.9)]
    good = [
        result_of(run_of(*many), percentiles=(), objectives=objectives)["request_goodput"]
        for objectives in ({"ttft": 200}, {"ttft": 200, "tpot": 100.1}, {"e2el": 1})
    ]
    assert good == [1.0, 0.5, 0.0]


def test_what_failed_is_counted_by_name():
    refused = Unavailable("no", code=grpc.StatusCode.UNAVAILABLE, reason="NO_WORKER")
    silent = dataclasses.replace(answered(0.1), timings=Timings(ttft_s=None, ttst_s=None, itl_s=(), e2e_s=1.0))
    result = result_of(run_of(refused, refused, silent, answered(0.1)), percentiles=(99,), objectives={"ttft": 1e6})
    assert (result["completed"], result["failed"]) == (1, 3)
    assert result["errors"] == {"NO_WORKER": 2, "NO_TOKENS": 1}
    assert result["request_goodput"] == 0.5
    assert result["mean_tpot_ms"] == 0


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [5.0, 1.0, 4.0, 2.0]])
@pytest.mark.parametrize("percent", [0, 33, 50, 99, 100])
def test_percentiles_are_those_of_numpy(values, percent):
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 33), (336, 200)])
def test_generated_images_are_images(size):
    data = random_png(*size, random.Random(1))
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert (image.size, image.mode) == (size, "RGB")
        assert image.getpixel((0, 0)) == image.getpixel((min(15, size[0] - 1), min(15, size[1] - 1)))
    assert random_png(*size, random.Random(2)) != data


WORKLOAD = Workload(
    input_words=5, images=(), image_size=(20, 10), num_images=2, prompts=None, base=Request(model="m"), seed=3
)


def test_the_same_seed_asks_the_same():
    first, again, other = (dataclasses.replace(WORKLOAD, seed=seed).requests(4) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert {len(request.prompt.split()) for request in first} == {5}
    assert len({image for request in first for image in request.images}) == 8
    assert {request.model for request in first} == {"m"}


def test_prompts_come_from_a_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"png")
    lines = [{"prompt": "one", "images": ["a.png"], "max_new_tokens": 7}, {"prompt": "two"}]
    (tmp_path / "prompts.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    base = Request(sampling=Sampling(temperature=0.5))
    workload = dataclasses.replace(WORKLOAD, prompts=str(tmp_path / "prompts.jsonl"), base=base)
    first, second, third = workload.requests(3)
    assert (first.prompt, list(first.images), first.sampling) == (
        "one",
        [b"png"],
        Sampling(max_new_tokens=7, temperature=0.5),
    )
    assert (second.prompt, list(second.images), second.sampling) == ("two", [], base.sampling)
    assert third == first


@pytest.mark.parametrize("line", ["", "no json", "[]", '{"images": []}', '{"prompt": "a", "image": "b"}'])
def test_a_file_of_another_form_is_refused(tmp_path, line):
    file = tmp_path / "prompts.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"prompts\.jsonl"):
        dataclasses.replace(WORKLOAD, prompts=str(file)).requests(1)


def test_arrivals_have_their_rate():
    times = list(itertools.islice(Arrivals(rate=50, burstiness=1, seed=1).times_s(), 4000))
    assert times == sorted(times)
    assert 45 < 4000 / times[-1] < 55
    gaps = np.diff(times)
    assert 0.9 < np.std(gaps) / np.mean(gaps) < 1.1  # of an exponential distribution it is 1
    regular = np.diff(list(itertools.islice(Arrivals(rate=50, burstiness=100, seed=1).times_s(), 400)))
    assert np.std(regular) / np.mean(regular) < 0.2
    assert list(itertools.islice(Arrivals(rate=math.inf, burstiness=1, seed=1).times_s(), 3)) == [0, 0, 0]


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (math.nan, 1), (1, 0)])
def test_arrivals_out_of_their_range_are_refused(rate, burstiness):
    with pytest.raises(ValueError, match="greater than 0"):
        Arrivals(rate=rate, burstiness=burstiness, seed=0)


def test_a_load_keeps_its_order_and_its_bound():
    echo = EchoService()
    server = serve(echo)
    echo.delays_s = {str(number): 0.1 for number in range(6)}
    done = []

    async def run():
        async with AsyncClient(echo.address, retry=RetryPolicy(max_attempts=1)) as client:
            requests = [Request(str(number)) for number in range(6)] + [Request("no")]
            arrivals = Arrivals(rate=math.inf, burstiness=1, seed=0)
            return await run_load(client, requests, arrivals, max_concurrency=2, advance=lambda: done.append(1))

    result = asyncio.run(run())
    server.stop(grace=None).wait()
    assert [getattr(outcome.answer, "text", "error") for outcome in result.outcomes] == [*"012345", "error"]
    assert (echo.most_at_once, len(done)) == (2, 7)
    assert 0.3 <= result.duration_s < 5


def bench(service, capsys, *options):
    exit_code = main(["bench", "--address", service.address, *options])
    return exit_code, *capsys.readouterr()


def test_bench_prints_and_saves(service, capsys, tmp_path):
    service.attempts = [whole_answer() for _ in range(6)]
    options = ("--num-prompts", "3", "--warmup", "2", "--max-concurrency", "1", "--random-output-len", "9")
    exit_code, out, err = bench(service, capsys, *options, "--retention", "0.3", "--save-result", str(tmp_path / "r"))
    assert (exit_code, err) == (0, "")
    assert "completed, failed      3, 0" in out
    assert "KV kept                768.0 KiB (12.5 %)" in out
    assert len(service.requests) == 5
    assert {request.sampling.max_new_tokens for request in service.requests} == {9}
    assert {request.compression.retention for request in service.requests} == {0.3}
    result = json.loads((tmp_path / "r").read_text())
    assert (result["completed"], result["total_output_tokens"], result["model_id"]) == (3, 9, "shapes-vlm")


def test_bench_json_is_one_line(service, capsys):
    service.attempts = [whole_answer() for _ in range(2)] + [[fail(grpc.StatusCode.NOT_FOUND)]]
    options = ("--num-prompts", "2", "--max-concurrency", "1", "--goodput", "ttft:9e9", "e2el:9e9")
    _, out, err = bench(service, capsys, *options, "--json", "--metric-percentiles", "50,99.9")
    (line,) = out.splitlines()
    result = json.loads(line)
    assert (result["completed"], result["failed"], result["errors"], err) == (1, 1, {"NOT_FOUND": 1}, "")
    assert result["request_goodput"] == result["request_throughput"]
    assert {"p50_ttft_ms", "p99.9_itl_ms"} <= set(result)
    assert (result["request_rate"], result["max_concurrency"]) == ("inf", 1)


def test_nothing_answered_is_an_error(service, capsys):
    service.attempts = [[fail(grpc.StatusCode.UNAVAILABLE, "no", reason="NO_WORKER")] for _ in range(2)]
    exit_code, out, err = bench(service, capsys, "--num-prompts", "2", "--warmup", "0")
    assert (exit_code, out) == (1, "")
    assert "vlcache status" in err


def test_ctrl_c_cancels_the_load(service):
    service.attempts = [[started(), service.hang]]
    command = [sys.executable, "-W", "error", "-m", "vlcache.cli", "bench", "--address", service.address]
    with subprocess.Popen([*command, "--max-concurrency", "1", "--warmup", "0"], stderr=subprocess.PIPE) as process:
        assert service.asked.wait(20)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, b"")
    assert service.cancelled.wait(5)
    assert len(service.requests) == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--num-prompts", "0"],
        ["--max-concurrency", "0"],
        ["--warmup", "-1"],
        ["--image-size", "9"],
        ["--image-size", "0x9"],
        ["--goodput", "itl:9"],
        ["--goodput", "ttft"],
        ["--metric-percentiles", "101"],
        ["--random-input-len", "0"],
        ["--images-per-prompt", "-1"],
        ["--request-rate", "0"],
    ],
)
def test_wrong_usage_is_exit_code_2(service, capsys, options):
    try:
        exit_code = bench(service, capsys, *options)[0]
    except SystemExit as stopped:
        exit_code = stopped.code
    assert exit_code == 2
    assert service.requests == []
