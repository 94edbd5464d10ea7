"""The command line becomes a checked configuration, or one sentence and exit code 2."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import pytest

from shared.config import Listen, parse_config


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
