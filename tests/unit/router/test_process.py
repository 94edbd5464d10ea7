"""The router as users start it: a process."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from vlcache.v1 import inference_pb2 as pb
from vlcache.v1 import inference_pb2_grpc
from vlcache.worker.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2_grpc, worker_pb2

from tests.unit.router.fakes import ask, compression, first_token, kinds, served_model

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "transformers", "numpy", "PIL")


@contextlib.contextmanager
def router(*flags: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A running router process and the line in which it says where it listens."""
    command = [sys.executable, "-W", "error", "-m", "router", *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"NO_COLOR": "1"}
    )
    try:
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], 60)
        line = process.stdout.readline() if readable else ""
        assert line, process.communicate(timeout=10)[1]
        yield process, json.loads(line)
    finally:
        process.kill()
        process.communicate()


class Worker(prefill_pb2_grpc.PrefillServiceServicer, decode_pb2_grpc.DecodeServiceServicer):
    """A prefill or decode worker on threads; its answer waits for `goes_on`."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.goes_on, self.asked = threading.Event(), threading.Event()

    def GetWorkerInfo(self, request, context):  # noqa: N802
        return worker_pb2.WorkerInfo(name=self.role, role=self.role, epoch="1", state="ready", model=served_model())

    def Reserve(self, request, context):  # noqa: N802
        return decode_pb2.ReserveResponse(token=b"t", transport="memory", reserved_bytes=1, lease_s=30)

    def Release(self, request, context):  # noqa: N802
        return decode_pb2.ReleaseResponse()

    def Prefill(self, request, context):  # noqa: N802
        self.asked.set()
        self.goes_on.wait(30)
        yield first_token("yes", pb.FINISH_REASON_STOP)
        yield compression()


@contextlib.contextmanager
def serving(role: str) -> Iterator[tuple[Worker, str]]:
    worker = Worker(role)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    add = {
        "prefill": prefill_pb2_grpc.add_PrefillServiceServicer_to_server,
        "decode": decode_pb2_grpc.add_DecodeServiceServicer_to_server,
    }
    add[role](worker, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield worker, f"127.0.0.1:{port}"
    finally:
        worker.goes_on.set()
        server.stop(0).wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_announces_itself_and_ends_with_0_on_a_signal(number: signal.Signals) -> None:
    with router("--registry", "static://127.0.0.1:1", "--name", "front") as (process, line):
        assert (line["event"], line["name"], line["role"]) == ("listening", "front", "router")
        metrics = urllib.request.urlopen(f"http://{line['metrics']}/metrics", timeout=10).read().decode()
        assert "vlcache_num_requests_running" in metrics
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        assert out == ""
        assert "draining" in err
        assert "Traceback" not in err


def test_drain_finishes_what_runs_and_refuses_what_is_new() -> None:
    with (
        serving("prefill") as (prefill, prefill_address),
        serving("decode") as (_, decode_address),
        router("--registry", f"static://{prefill_address},{decode_address}") as (process, line),
        grpc.insecure_channel(line["address"]) as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = next_ready(stub)
        assert prefill.asked.wait(30)
        process.send_signal(signal.SIGTERM)
        assert refusal(stub) == "this router is draining"
        prefill.goes_on.set()
        assert kinds(list(call)) == ["delta", "compression", "finished"]
        _, err = process.communicate(timeout=30)
        assert process.returncode == 0, err


def next_ready(stub: Any) -> Any:
    """A request that was accepted: asks again while the router has not seen its workers yet."""
    for _ in range(200):
        call = stub.Generate(ask(), timeout=30)
        with contextlib.suppress(grpc.RpcError):
            assert next(call).HasField("started")
            return call
        assert call.code() is grpc.StatusCode.UNAVAILABLE
        threading.Event().wait(0.05)
    raise AssertionError("the router never saw its workers")


def refusal(stub: Any) -> str:
    """The text with which the draining router turns a request away; until the signal arrives it takes them."""
    for _ in range(200):
        call = stub.Generate(ask(), timeout=30)
        with contextlib.suppress(grpc.RpcError):
            next(call)
            call.cancel()
            continue
        assert call.code() is grpc.StatusCode.UNAVAILABLE
        return str(call.details())
    raise AssertionError("the router goes on accepting requests")


def test_a_drain_that_takes_too_long_cancels_what_runs_and_still_ends_with_0() -> None:
    with (
        serving("prefill") as (prefill, prefill_address),
        serving("decode") as (_, decode_address),
        router("--registry", f"static://{prefill_address},{decode_address}", "--drain-s", "0.2") as (process, line),
        grpc.insecure_channel(line["address"]) as channel,
    ):
        call = next_ready(inference_pb2_grpc.InferenceServiceStub(channel))
        assert prefill.asked.wait(30)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        assert "cancelled" in err
        with pytest.raises(grpc.RpcError):
            list(call)


@pytest.mark.parametrize(
    "flags",
    [
        ("--registry", "static://"),
        ("--registry", "postbox://here"),
        ("--registry", "static://127.0.0.1:1", "--queue-timeout-s", "0"),
        ("--registry", "static://127.0.0.1:1", "--max-waiting-mib", "-1"),
        ("--registry", "static://127.0.0.1:1", "--tenant-rate", "nan"),
        ("--registry", "static://127.0.0.1:1", "--tenant-burst", "0"),
        ("--registry", "static://127.0.0.1:1", "--min-retention", "0"),
        ("--registry", "static://127.0.0.1:1", "--shadow-share", "1.1"),
        ("--registry", "static://127.0.0.1:1", "--port", "70000"),
        (),
    ],
)
def test_a_bad_configuration_is_a_sentence_not_a_trace(flags: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "router", *flags]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr
    assert ended.stderr.strip()


def test_the_process_loads_nothing_heavy() -> None:
    code = f"import sys, router.__main__; print([name for name in {HEAVY!r} if name in sys.modules])"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout.strip() == "[]"
