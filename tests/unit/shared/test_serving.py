"""A process of several roles: each on its own ports, said one by one, drained together, given back in order."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shared.config import Listen
from shared.rpc.server import NOT_SERVING, SERVING
from shared.rpc.serving import serve
from shared.telemetry.metrics import DecodeMetrics, PrefillMetrics, WorkerMetrics
from tests.unit.shared.scripted import run

CHECK = health_pb2.HealthCheckRequest()


class Role:
    """Writes down what happens to it; a drain waits for that of all `roles`."""

    services = ()
    max_request_bytes = 1 << 20
    listen = Listen()

    def __init__(self, role: str, metrics: WorkerMetrics, diary: list[str], roles: int) -> None:
        self.role, self.name, self.metrics = role, f"w-{role}", metrics
        self._diary, self._roles = diary, roles
        self.seen_while_draining: list[int] = []
        self.address = ""

    def register(self, server: grpc.aio.Server) -> None:
        self._diary.append(f"register {self.role}")

    async def drain(self, timeout_s: float) -> None:
        self._diary.append(f"drain {timeout_s:g}")
        while self._diary.count(f"drain {timeout_s:g}") < self._roles:  # noqa: ASYNC110 - the other one's
            await asyncio.sleep(0)
        self.seen_while_draining.append(await health(self.address))

    async def close(self) -> None:
        self._diary.append(f"close {self.role}")


async def health(address: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        return (await health_pb2_grpc.HealthStub(channel).Check(CHECK)).status


def metrics_at(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        return response.read().decode()


def test_two_roles_live_and_end_together(capsys: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        diary: list[str] = []
        roles = [
            Role("prefill", PrefillMetrics(worker="w", model="m"), diary, 2),
            Role("decode", DecodeMetrics(worker="w", model="m"), diary, 2),
        ]
        serving = asyncio.create_task(serve(roles, drain_s=7))
        lines: list[str] = []
        while len(lines) < 2:
            await asyncio.sleep(0.01)
            assert not serving.done(), serving.exception()
            lines += capsys.readouterr().out.splitlines()
        said = [json.loads(line) for line in lines]
        assert [(each["name"], each["role"]) for each in said] == [("w-prefill", "prefill"), ("w-decode", "decode")]
        assert len({each[what] for each in said for what in ("address", "metrics")}) == 4
        for role, each in zip(roles, said, strict=True):
            role.address = each["address"]
            assert await health(role.address) == SERVING
            assert f'role="{role.role}"' in await asyncio.to_thread(metrics_at, each["metrics"])
        os.kill(os.getpid(), signal.SIGTERM)
        await serving
        assert [role.seen_while_draining for role in roles] == [[NOT_SERVING], [NOT_SERVING]]
        assert diary == ["register prefill", "register decode", "drain 7", "drain 7", "close prefill", "close decode"]

    run(main)
