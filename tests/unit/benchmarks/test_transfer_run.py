"""The transfer benchmark from one end to the other, with small parcels and few rounds."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from benchmarks.picture import picture
from benchmarks.transfer.__main__ import TransferConfig, main
from benchmarks.transfer.methods import METHODS
from benchmarks.transfer.processes import Peer


def test_every_method_moves_a_parcel_and_tokens_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "figures.json"
    flags = "--sizes-mb 1 2 --rounds 2 --warmup 1 --lateness-s 0.2 --lateness-periods 1"
    monkeypatch.setattr(sys, "argv", ["transfer", *flags.split(), "--json", str(target)])
    main()
    figures = json.loads(target.read_text())
    assert (figures["benchmark"], figures["workload"]["sizes_mb"]) == ("transfer", [1, 2])
    assert figures["judged_size"] == "2 MB"
    assert list(figures["in_place_ms"]) == ["1 MB", "2 MB"]
    for size in figures["sizes"].values():
        assert list(size["methods"]) == list(METHODS)
        for each in size["methods"].values():
            assert each["wall_ms"]["best"] > 0
    grpc = figures["sizes"]["2 MB"]["methods"]["grpc"]
    assert min(grpc["sender_cpu_ms"], grpc["receiver_cpu_ms"]) > 0, "both processes have worked"
    late = figures["token_lateness_ms"]
    assert (late["idle"]["parcels"], late["idle"]["tokens"] > 10) == (0, True)
    assert min(late["grpc"]["parcels"], late["memory"]["parcels"], late["grpc"]["tokens"]) > 0
    assert figures["congestion_control"]["tcp"]
    assert "A parcel of 2 MB" in picture(figures)
    printed = capsys.readouterr().out
    assert "| 2 MB | memory_in_place |" in printed
    assert "| grpc_over_bare_grpc | >= 0.95 |" in printed


def test_a_process_that_fails_ends_the_benchmark() -> None:
    async def body() -> None:
        peer = await Peer.start("benchmarks.transfer.receiver", "no number", core=None)
        with pytest.raises(ChildProcessError, match="exit code 1"):
            await peer.answer()
        await peer.stop()

    asyncio.run(body())


@pytest.mark.parametrize(
    "changes",
    [{"sizes_mb": ()}, {"sizes_mb": (5, 5)}, {"sizes_mb": (0,)}, {"rounds": 1}, {"lateness_periods": 0}],
)
def test_impossible_workloads_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="at least"):
        TransferConfig(**changes)  # type: ignore[arg-type]
