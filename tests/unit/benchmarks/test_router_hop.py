"""The router hop's benchmark over its own workers and a real router, in little."""

from __future__ import annotations

import json

import pytest

from benchmarks.router_hop import main


def test_every_number_of_streams_is_measured_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--streams", "1", "3", "--tokens", "12", "--rounds", "1", "--step-ms", "5", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [row["streams"] for row in rows] == [1, 3]
    for row in rows:
        assert 0 < row["direct_ms_p50"] <= row["direct_ms_p99"]
        assert row["added_ms_p99"] == row["routed_ms_p99"] - row["direct_ms_p99"]
        assert row["tokens_per_s_per_core"] > 0


@pytest.mark.parametrize("flags", [["--streams", "0"], ["--tokens", "5"], ["--rounds", "0"], ["--step-ms", "0"]])
def test_what_makes_no_sense_is_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2
