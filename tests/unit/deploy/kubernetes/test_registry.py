"""The Redis of the manifests, really started: who may do what, and who may not."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.integration.redis_server import find_binary, free_port
from tests.unit.deploy.kubernetes.manifests import Container, rendered

PASSWORDS = {"WORKER_PASSWORD": "a1b2c3", "ROUTER_PASSWORD": "d4e5f6"}
GIVE_UP_S = 20.0


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Where the container's own command listens, on another port than the manifest's."""
    (container,) = (each for each in rendered("cpu").containers if each.name == "redis/redis")
    chosen = free_port()
    with started(container, chosen) as process:
        wait_until_it_listens(chosen, process)
        yield chosen
        process.terminate()
        assert process.wait(GIVE_UP_S) == 0


def started(container: Container, port: int) -> subprocess.Popen[bytes]:
    command = [*container.spec["command"], *container.spec["args"]]
    listening = [each.replace(f"port {container.ports['redis']}\n", f"port {port}\n") for each in command]
    assert listening != command
    assert container.environment.keys() == PASSWORDS.keys()
    path = f"{Path(find_binary()).parent}:{os.environ['PATH']}"
    return subprocess.Popen(listening, env={"PATH": path, **PASSWORDS}, stdout=subprocess.DEVNULL)


def wait_until_it_listens(port: int, process: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + GIVE_UP_S
    while True:
        assert process.poll() is None, "it ended"
        assert time.monotonic() < give_up
        try:
            with redis.Redis(port=port) as anybody, pytest.raises(redis.AuthenticationError):
                anybody.ping()
        except redis.ConnectionError:
            time.sleep(0.02)
        else:
            return


def client(port: int, user: str) -> redis.Redis:
    return redis.Redis(
        port=port, username=user, password=PASSWORDS[f"{user.upper()}_PASSWORD"], protocol=2, driver_info=None
    )


def test_a_worker_writes_and_a_router_reads(port: int) -> None:
    with client(port, "worker") as worker, client(port, "router") as router:
        worker.set("vlcache:worker:prefill:1", "here", ex=10)
        assert list(router.scan_iter("vlcache:worker:*")) == [b"vlcache:worker:prefill:1"]
        assert router.getrange("vlcache:worker:prefill:1", 0, 9) == b"here"
        worker.delete("vlcache:worker:prefill:1")
        assert list(router.scan_iter("vlcache:worker:*")) == []


@pytest.mark.parametrize(
    ("user", "command"),
    [
        ("worker", ("GET", "vlcache:worker:prefill:1")),
        ("worker", ("SET", "another", "1")),
        ("worker", ("SCAN", "0")),
        ("worker", ("FLUSHALL",)),
        ("router", ("SET", "vlcache:worker:prefill:1", "1")),
        ("router", ("GETRANGE", "another", "0", "1")),
        ("router", ("CONFIG", "GET", "*")),
    ],
)
def test_nobody_may_do_more(port: int, user: str, command: tuple[str, ...]) -> None:
    with client(port, user) as connection, pytest.raises(redis.exceptions.NoPermissionError):
        connection.execute_command(*command)


def test_without_a_name_nobody_may_do_anything(port: int) -> None:
    with redis.Redis(port=port) as anybody, pytest.raises(redis.AuthenticationError):
        anybody.keys()
