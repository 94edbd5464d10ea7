"""The command line becomes a checked configuration, or one sentence and exit code 2."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import pytest

from shared.config import Listen, WorkerConfig, WorkerListen, parse_config


@dataclass(frozen=True, kw_only=True)
class Example:
    """An example."""

    listen: Listen = field(default_factory=Listen)
    """Where to listen."""
    share: float = 0.1
    """A share."""
    verbose: bool = False
    """Say more."""


def parse(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Example:
    monkeypatch.setattr(sys, "argv", ["example", *arguments])
    return parse_config(Example, "An example service.")


def test_by_default_a_service_listens_on_loopback_and_picks_free_ports() -> None:
    assert Listen() == Listen(host="127.0.0.1", port=0, metrics_port=0)


@pytest.mark.parametrize("port", [0, 1, 65535])
def test_every_port_is_accepted(port: int) -> None:
    assert Listen(port=port, metrics_port=port).port == port


@pytest.mark.parametrize("port", [-1, 65536, 10**9])
@pytest.mark.parametrize("name", ["port", "metrics_port"])
def test_an_impossible_port_is_refused(name: str, port: int) -> None:
    with pytest.raises(ValueError, match=f"between 0 and 65535, not {port}"):
        Listen(**{name: port})


def test_flags_fill_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = parse(monkeypatch, "--listen.port", "5000", "--share", "0.5", "--verbose", "True")
    assert parsed == Example(listen=Listen(port=5000), share=0.5, verbose=True)


def test_no_flags_give_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(monkeypatch) == Example()


@pytest.mark.parametrize(
    "arguments", [("--listen.port", "70000"), ("--share", "much"), ("--no-such-flag", "1"), ("--verbose",)]
)
def test_a_bad_command_line_ends_the_process_with_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(monkeypatch, *arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err


def test_an_impossible_value_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--listen.port", "70000")
    printed = capsys.readouterr()
    assert "70000" in printed.out + printed.err


def test_help_names_every_field(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(monkeypatch, "--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--listen.host", "--listen.port", "--listen.metrics-port", "--share", "--verbose"):
        assert flag in text


@pytest.mark.parametrize(
    ("advertise", "told"),
    [("", "127.0.0.1:7"), ("node-1:9", "node-1:9"), ("node-1:0", "node-1:7"), ("[fe80::1]:0", "[fe80::1]:7")],
)
def test_others_are_told_where_to_find_a_worker(advertise: str, told: str) -> None:
    assert WorkerListen(advertise=advertise).advertised("127.0.0.1:7") == told


@pytest.mark.parametrize("advertise", ["node-1", ":1", "node-1:70000"])
def test_an_impossible_advertised_address_is_refused(advertise: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        WorkerListen(advertise=advertise)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_a_registry_never_hears_an_address_that_nobody_can_connect_to(host: str) -> None:
    with pytest.raises(ValueError, match="advertise"):
        WorkerConfig(model="m", registry="redis://host", listen=WorkerListen(host=host), allow_plaintext=True)
    listen = WorkerListen(host=host, advertise="node-1:0")
    assert WorkerConfig(model="m", registry="redis://host", listen=listen, allow_plaintext=True).listen == listen
    assert WorkerConfig(model="m", listen=WorkerListen(host=host), allow_plaintext=True).registry == ""


@pytest.mark.parametrize("registry", ["static://a:1", "redis://", "elsewhere"])
def test_a_worker_is_refused_a_registry_it_cannot_write_to(registry: str) -> None:
    with pytest.raises(ValueError):
        WorkerConfig(model="m", registry=registry)
