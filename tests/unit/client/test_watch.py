"""`vlcache status --watch`: what it draws, and that it lives through what happens to a service and to a terminal."""

import dataclasses
import io
import signal
import sys
import time

import pytest
from rich.console import Console
from vlcache import KVBytes, ServerInfo, Totals, Worker
from vlcache.cli import main
from vlcache.cli.dashboard import KV_MARKS, Dashboard, Moment, rates_between
from vlcache.v1 import inference_pb2 as pb

from tests.unit.client.service import serve
from tests.unit.client.terminal import PATIENCE_S, Terminal

MIB = 2**20


def info(**changes):
    """A service with three workers; the second one's memory is full."""
    values = {
        "version": "0.1.0",
        "requests_running": 5,
        "requests_waiting": 2,
        "totals": Totals(
            requests=10, generated_tokens=400, kv_full_bytes=100 * MIB, kv_kept_bytes=10 * MIB, kv_sent_bytes=11 * MIB
        ),
        "workers": (
            worker("prefill-0", "prefill", KVBytes(capacity=64 * MIB, reserved=0, filling=0, active=0, retained=MIB)),
            worker(
                "decode-0",
                "decode",
                KVBytes(capacity=256 * MIB, reserved=64 * MIB, filling=64 * MIB, active=128 * MIB, retained=0),
            ),
            dataclasses.replace(
                worker("decode-1", "decode", KVBytes(capacity=0, reserved=0, filling=0, active=0, retained=0)),
                state="unreachable",
            ),
        ),
    }
    return ServerInfo(**(values | changes))


def worker(name, role, kv):
    return Worker(
        name=name,
        role=role,
        address="127.0.0.1:1",
        state="ready",
        model="shapes-vlm",
        requests_running=3,
        requests_waiting=1,
        kv=kv,
    )


def drawn(*moments, width=120):
    """The lines of the dashboard after these looks."""
    dashboard = Dashboard("127.0.0.1:50051")
    for moment in moments:
        dashboard.take(moment)
    console = Console(file=io.StringIO(), width=width, height=30)
    console.print(dashboard)
    return console.file.getvalue().splitlines()


def row(lines, name):
    (line,) = [line for line in lines if line.startswith(name)]
    return line


def test_workers_with_their_load_and_memory():
    lines = drawn(Moment(at_s=0, info=info()))
    assert "5 running, 2 waiting for memory" in lines[0]
    assert row(lines, "prefill-0").split()[:6] == ["prefill-0", "prefill", "ready", "shapes-vlm", "3", "1"]
    assert row(lines, "prefill-0").endswith("1.0 MiB of 64.0 MiB")
    assert "unreachable" in row(lines, "decode-1")


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_bars_take_what_room_there_is(width):
    lines = drawn(Moment(at_s=0, info=info()), width=width)
    assert all(len(line) <= width for line in lines)
    marks = {state: mark for state, (mark, _) in KV_MARKS.items()}
    full, empty, little = (row(lines, name) for name in ("decode-0", "decode-1", "prefill-0"))
    assert "·" not in full
    assert empty.count("·") == sum(map(full.count, marks.values())) >= 5
    assert full.count(marks["active"]) == pytest.approx(2 * full.count(marks["filling"]), abs=1)
    # little is not nothing
    assert 1 <= little.count(marks["retained"]) <= 1 + width // 64


def test_sums_and_what_they_grow_by_per_second():
    before = Moment(at_s=10.0, info=info())
    grown = dataclasses.replace(
        before.info.totals, requests=12, generated_tokens=500, kv_full_bytes=120 * MIB, kv_kept_bytes=12 * MIB
    )
    lines = drawn(before, Moment(at_s=12.0, info=info(totals=grown)))
    assert "50 tokens/s" in lines[0]
    assert row(lines, "requests").split() == ["requests", "12", "1.0"]
    assert row(lines, "tokens").split() == ["tokens", "500", "50.0"]
    assert row(lines, "KV full").split()[2:6] == ["120.0", "MiB", "10.0", "MiB/s"]
    assert row(lines, "KV saved").split()[2:6] == ["108.0", "MiB", "9.0", "MiB/s"]
    assert row(lines, "KV saved").endswith("90.0 % of full")


def test_there_are_no_rates_over_a_restart():
    before = Moment(at_s=10.0, info=info())
    fresh = Totals(requests=0, kv_full_bytes=0, kv_kept_bytes=0, kv_sent_bytes=0)
    after = Moment(at_s=11.0, info=info(totals=fresh))
    assert rates_between(before, after) is None
    assert rates_between(None, before) is None
    assert "- tokens/s" in drawn(before, after)[0]


def test_without_an_answer_the_last_one_stays():
    lines = drawn(Moment(at_s=time.monotonic() - 7, info=info()), Moment(at_s=0, info=None, trouble="nobody there"))
    assert "unreachable, last heard 7 s ago" in lines[0]
    assert "nobody there" in lines[0]
    assert row(lines, "decode-0")
    assert "unreachable" in drawn(Moment(at_s=0, info=None, trouble="nobody there"))[0]


def test_it_needs_a_terminal_and_rich(service, capsys, monkeypatch):
    command = ["status", "--address", service.address, "--watch"]
    assert main(command) == 2
    assert "--watch needs a terminal" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "vlcache.cli.watch", None)
    assert main(command) == 2
    assert "pip install 'vlcache[cli]'" in capsys.readouterr().err


@pytest.mark.parametrize("period", ["0", "nan", "inf", "soon"])
def test_a_period_is_a_number_of_seconds(period, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["status", "--watch", period])
    assert ended.value.code == 2


def test_it_outlives_its_service_and_ends_with_ctrl_c(service):
    said = info()
    service.info = pb.GetServerInfoResponse(
        version=said.version,
        totals=pb.Totals(**dataclasses.asdict(said.totals)),
        workers=[
            pb.Worker(**{**dataclasses.asdict(each), "kv": pb.KVBytes(**dataclasses.asdict(each.kv))})
            for each in said.workers
        ],
    )
    server = serve(service)
    command = (sys.executable, "-m", "vlcache.cli", "status", "--address", service.address, "--watch", "0.2")
    with Terminal(*command) as terminal:
        narrow = terminal.shows(r"decode-0 [^\r\n]*of 256\.0 MiB")
        terminal.resize(160)
        terminal.shows(r"decode-0 [^\r\n]{120,}of 256\.0 MiB")
        assert len(narrow) <= 100
        server.stop(grace=None).wait()
        terminal.shows("unreachable, last heard")
        server = serve(service, service.address)
        terminal.shows("0 running, 0 waiting for memory")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(timeout=PATIENCE_S) == 0
    server.stop(grace=None).wait()
