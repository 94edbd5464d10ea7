"""Workers without a network behind them, for what only looks at their loads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vlcache.worker.v1 import worker_pb2

from router.placement.base import Demand, Group, Pair
from router.workers.worker import Worker
from tests.unit.router.fakes import served_model

CAPACITY = 1 << 20


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def worker(role: str, name: str, *, host: str = "", settings: dict[str, Any] | None = None, **info: Any) -> Worker:
    """A ready worker at an address of its own; `info` is what it says of itself."""
    client: Any = SimpleNamespace(open_token_stream=None, address=f"{host or name}:1")
    said = worker_pb2.WorkerInfo(
        **{"name": name, "role": role, "epoch": "1", "state": "ready", "model": served_model()}
        | {"arena_socket": "/run/arena"}
        | info
    )
    if role == "decode":
        said.kv.capacity = said.kv.capacity or CAPACITY
    return Worker(client, said, **settings or {})


def prefill(count: int, **options: Any) -> list[Worker]:
    return [worker("prefill", f"p{number}", **options) for number in range(count)]


def decode(count: int, **options: Any) -> list[Worker]:
    return [worker("decode", f"d{number}", **options) for number in range(count)]


def demand(prompt_tokens: int = 100, kv_tokens: int = 20, image: int | None = None) -> Demand:
    return Demand(prompt_tokens=prompt_tokens, kv_tokens=kv_tokens, image_key=lambda: image)


def names(pair: Pair) -> tuple[str, str]:
    return pair.prefill.info.name, pair.decode.info.name


def group_of(num_prefill: int, num_decode: int) -> Group:
    return Group(prefill(num_prefill), decode(num_decode))
