"""How fast parcels move, beside memcpy and a plain socket, and how late a transfer makes other requests' tokens.

Two processes, each on a core of its own: the sender is what a prefill worker runs (arena, arena socket, KVSender), the
receiver what a decode worker runs (gRPC server, KVReceiver, reservations, KV pool), without models. In each round
every method moves every size once, so that a noisy machine disturbs all alike; ratios are those of medians.

    memcpy            one np.copyto between warm buffers, in the sender
    tcp               sendall / recv_into a warm buffer over loopback, and one byte back; Reno where it is allowed
    bare_grpc         a grpcio stream that does nothing else: the product's chunk size, options and allocator, no
                      serialisers; each chunk is copied out of one warm buffer and into another
    grpc              the product's transport: from KVSender.send to its return, with framing and a checksum per chunk
                      on both sides; the parcel ends in the receive buffer and is not installed
    memory_in_place   the product's shared memory, the parcel already in the arena: KVSender.send alone, not installed
    memory            the same, and before it one copy of the parcel into the arena
    *_installed       the whole delivery: the parcel ends in the KV pool, its digest is verified

So `grpc` compares with `bare_grpc`, and `memory` with `memcpy`; what a request waits for is `*_installed`.
Reservation and release are never included. CPU milliseconds are those of all threads of a process.

Token lateness: the receiver also serves 8 streams of 30 tokens/s to a third process; a token is late by the time from
when it was due until it is read. Idle, or while parcels arrive back to back and are installed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from benchmarks.report import table, write_json
from benchmarks.transfer.figures import goals, lateness_figures, transfer_figures
from benchmarks.transfer.methods import Sample
from benchmarks.transfer.parcels import kept_tokens
from benchmarks.transfer.processes import Peer, pick_cores
from benchmarks.transfer.tokens import TokenReader

MB = 1e6
SETTLE_S = 0.5
LATENESS = {"idle": None, "grpc": "grpc_installed", "memory": "memory_installed"}


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """What to measure."""

    sizes_mb: tuple[int, ...] = (5, 50, 150)
    """Parcels, MB (1e6 bytes); the middle one is judged."""
    rounds: int = 41
    """Measured transfers of each size and method."""
    warmup: int = 4
    """Rounds before that."""
    lateness_s: float = 5.0
    """Length of a period with or without transfers of the judged size, seconds."""
    lateness_periods: int = 3
    """Periods of each kind."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE|-")] = None
    """Where to write the figures; `-` prints them as the last line."""

    def __post_init__(self) -> None:
        if not self.sizes_mb or min(self.sizes_mb) < 1 or len(set(self.sizes_mb)) < len(self.sizes_mb):
            raise ValueError(f"sizes_mb must be different sizes of at least 1 MB, not {self.sizes_mb}")
        if self.rounds < 2 or self.lateness_periods < 1 or self.lateness_s <= 0:
            raise ValueError("at least two rounds and one period of some length are needed")


async def measure(config: TransferConfig) -> dict[str, Any]:
    """Runs both processes and returns the figures."""
    sizes = [kept_tokens(size * MB) for size in sorted(config.sizes_mb)]
    sender_core, receiver_core = pick_cores()
    async with AsyncExitStack() as stack:
        receiver = await Peer.start("benchmarks.transfer.receiver", str(max(sizes)), core=receiver_core)
        stack.push_async_callback(receiver.stop)
        where = await receiver.answer()
        sender = await Peer.start("benchmarks.transfer.sender", core=sender_core)
        stack.push_async_callback(sender.stop)
        congestion_control = await sender.ask(receiver=where, sizes=sizes)
        samples = await sender.ask(do="rounds", warmup=config.warmup, rounds=config.rounds)
        lateness = await _lateness(config, sender, where["address"])
    figures = transfer_figures([Sample(**sample) for sample in samples])
    figures |= {"token_lateness_ms": lateness, "congestion_control": congestion_control}
    return {"goals": goals(figures), **figures}


async def _lateness(config: TransferConfig, sender: Peer, address: str) -> dict[str, Any]:
    late: dict[str, list[float]] = {kind: [] for kind in LATENESS}
    arrived = dict.fromkeys(LATENESS, 0)
    async with TokenReader(address) as reader:
        for _ in range(config.lateness_periods):
            for kind, method in LATENESS.items():
                await asyncio.sleep(SETTLE_S)
                reader.take()
                arrived[kind] += await _period(config, sender, method)
                late[kind] += reader.take()
    return {kind: {**lateness_figures(late[kind]), "parcels": arrived[kind]} for kind in LATENESS}


async def _period(config: TransferConfig, sender: Peer, method: str | None) -> int:
    """Lets a period pass; returns how many parcels arrived in it."""
    if method is None:
        await asyncio.sleep(config.lateness_s)
        return 0
    judged = len(config.sizes_mb) // 2
    parcels: int = await sender.ask(do="back_to_back", method=method, load=judged, seconds=config.lateness_s)
    return parcels


def main() -> None:
    """Measures, prints tables, writes JSON."""
    config = tyro.cli(TransferConfig, description=__doc__)
    figures = asyncio.run(measure(config))
    sys.stdout.write("\n\n".join(_tables(figures)) + "\n")
    workload = {name: value for name, value in dataclasses.asdict(config).items() if name != "json"}
    write_json(config.json, {"benchmark": "transfer", "workload": workload, **figures})


def _tables(figures: Mapping[str, Any]) -> list[str]:
    rows = [_row(name, method, size) for name, size in figures["sizes"].items() for method in size["methods"]]
    header = ["size", "method", "p5 ms", "p50 ms", "p95 ms", "MB/s", "/ memcpy", "sender CPU ms", "receiver CPU ms"]
    late = [
        [kind, *(f"{each[name]:.2f}" for name in ("p50", "p90", "p99", "max")), str(each["parcels"])]
        for kind, each in figures["token_lateness_ms"].items()
    ]
    judged = [
        [name, each["goal"], f"{each['measured']:.3g}", "yes" if each["met"] else "no"]
        for name, each in figures["goals"].items()
    ]
    return [
        table(header, rows),
        table(["token lateness, ms", "p50", "p90", "p99", "max", "parcels"], late),
        table([f"goal, at {figures['judged_size']}", "wanted", "measured", "met"], judged),
        "TCP congestion control: "
        + ", ".join(f"{name} {used}" for name, used in figures["congestion_control"].items()),
    ]


def _row(name: str, method: str, size: Mapping[str, Any]) -> list[str]:
    each, memcpy_ms = size["methods"][method], size["methods"]["memcpy"]["wall_ms"]["p50"]
    times = [f"{each['wall_ms'][cut]:.2f}" for cut in ("p5", "p50", "p95")]
    ratio = f"{memcpy_ms / each['wall_ms']['p50']:.2f}"
    cpu = [f"{each[side]:.1f}" for side in ("sender_cpu_ms", "receiver_cpu_ms")]
    return [name, method, *times, f"{each['mb_per_s']:.0f}", ratio, *cpu]


if __name__ == "__main__":
    main()
