"""The whole benchmark against a real router and workers without a model."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from benchmarks.picture import picture
from benchmarks.serve.__main__ import main
from benchmarks.serve.config import ServeBenchConfig
from benchmarks.serve.measure import measure
from deploy.local.stack import Modules
from shared.errors import ResourceExhaustedError
from tests.unit.router.fakes import TOKEN_BYTES, FakePrefill, bench, compression, first_token, run, transfer

FAKES = Modules(prefill="tests.unit.deploy.fake_worker", decode="tests.unit.deploy.fake_worker", imported=())
# Within what the fake model serves: two images and 64 tokens.
SMALL: dict[str, Any] = {"num_prompts": 5, "phases": 2, "warmup": 1, "max_new_tokens": 3, "tasks": ("read",)}


def test_a_stack_of_its_own_is_measured_and_reported(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--num-prompts", "4", "--warmup", "1", "--concurrency", "1", "3", "--max-new-tokens", "3"]
    flags += ["--json", "-"]
    assert main(flags, modules=FAKES) == 0
    out, err = capsys.readouterr()
    assert "| 3 clients | 0.1 | 4 | 0 |" in out
    assert "18/18" in err, "the progress bar counts every request"
    found = json.loads(out.splitlines()[-1])
    assert found["benchmark"] == "serve"
    assert found["environment"]["cores"] >= 1
    assert found["workload"]["concurrency"] == [1, 3]
    assert [(row["load"], row["retention"]) for row in found["results"]] == [
        ("1 client", 1.0),
        ("1 client", 0.1),
        ("3 clients", 1.0),
        ("3 clients", 0.1),
    ]
    assert all(row["completed"] == 4 and row["total_output_tokens"] == 12 for row in found["results"])
    assert found["kv_memory_bytes"] == 1 << 20
    assert found["goodput_ratio"] > 0
    assert picture(found).startswith("<svg")


def test_requests_carry_the_load_and_phases_turn_round() -> None:
    async def scenario() -> None:
        async with bench() as service:
            config = ServeBenchConfig(**SMALL, concurrency=(1,))
            found = await measure(config, service.router.address)
            asked = [seen.request for seen in service.prefill[0].requests]
            retentions = [request.compression.retention for request in asked]
            warmup, first, second = retentions[:2], retentions[2:8], retentions[8:]
            assert warmup == [1.0, 0.1]
            assert first == [1.0] * 3 + [0.1] * 3
            assert second == [0.1] * 2 + [1.0] * 2
            assert all(request.sampling.ignore_eos and request.sampling.max_new_tokens == 3 for request in asked)
            pixels = [request.messages[0].parts[0].image.data for request in asked]
            assert pixels[2:5] == pixels[5:8], "every retention meets the same prompts"
            assert len(set(pixels)) == 6
            assert [row["completed"] for row in found["results"]] == [5, 5]
            row = found["results"][0]
            assert row["total_input_tokens"] == 5 * 50
            assert row["kv_bytes_per_sequence"] == 100 + 3 * TOKEN_BYTES

    run(scenario)


def test_a_refusal_is_counted_and_not_tried_again() -> None:
    async def scenario() -> None:
        prefill = FakePrefill()

        def script(request: Any) -> list[Any]:
            if request.request.compression.retention == 1.0:
                raise ResourceExhaustedError("full", retry_after_s=0.01)
            return [first_token(), compression(), transfer()]

        prefill.script = script
        async with bench([prefill]) as service:
            config = ServeBenchConfig(**SMALL, request_rate=(float("inf"),))
            found = await measure(config, service.router.address)
        full, kept = found["results"]
        assert (full["load"], full["completed"], full["failed_by_code"]) == (
            "inf requests/s",
            0,
            {"RESOURCE_EXHAUSTED": 5},
        )
        assert full["kv_bytes_per_sequence"] is None
        assert (kept["completed"], kept["failed"]) == (5, 0)

    run(scenario)


@pytest.mark.parametrize(
    "flags", [["--phases", "0"], ["--goodput", "ttft"], ["--retentions", "2"], ["--concurrency", "x"]]
)
def test_wrong_flags_are_a_sentence(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code != 0
    assert "Traceback" not in capsys.readouterr().err


def test_nobody_at_the_address_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.serve.measure.READY_S", 0.2)

    async def unused_port() -> int:
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        async with server:
            return int(server.sockets[0].getsockname()[1])

    port = asyncio.run(unused_port())
    with pytest.raises(SystemExit, match="does not answer"):
        main(["--address", f"127.0.0.1:{port}", "--num-prompts", "2", "--warmup", "0"])
