"""The real parsers of the project's programs, asked about a command line; nothing behind them is run."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import tyro
from vlcache.cli import main as vlcache
from vlcache.cli.serve import launcher_flags

PARSERS = ("tyro.cli(", "parse_config(", ".parse_args(", "subcommand_cli_from_dict(")
_FLAG = re.compile(r"--[a-z][a-z0-9.-]*")


class _Parsed(BaseException):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def complaint(words: list[str]) -> str:
    """What the program says against a command line of `vlcache` or `python -m`; empty if it would begin to work."""
    said, output = _parse(words)
    return "" if isinstance(said, _Parsed) or not said.code else output or str(said)


def unknown_flags(words: list[str]) -> set[str]:
    """Flags that the program's help does not know. `complaint` tells of them only where nothing else is missing."""
    given = {match[0] for word in words if (match := _FLAG.match(word))}
    if words[0] == "vlcache":
        asked = [*words[:2], "--help"]
    else:
        command = words[3:4] if words[3:] and words[3].isalpha() else []
        asked = [*words[:3], *command, "--help"]
    return given - set(_FLAG.findall(_parse(asked)[1])) - {"--help"} if given else set()


def module_file(module: str) -> Path | None:
    """What `python -m MODULE` runs; None where there is no such module."""
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.submodule_search_locations:
        spec = importlib.util.find_spec(f"{module}.__main__")
    return Path(spec.origin) if spec is not None and spec.origin else None


def has_parser(module: str) -> bool:
    """Whether a program takes arguments: one that does not would do its work at once."""
    file = module_file(module)
    return file is not None and any(parser in file.read_text() for parser in PARSERS)


def _parse(words: list[str]) -> tuple[_Parsed | SystemExit, str]:
    if words[0] == "vlcache" and words[1:2] == ["serve"]:
        words = ["python", "-m", "deploy.local", "serve", *launcher_flags(words[2:])]
    if words[0] == "vlcache":
        return _stopped(lambda: vlcache(words[1:]))
    _, minus_m, module, *arguments = words
    assert minus_m == "-m", words
    assert has_parser(module), f"{module} has no parser that could be asked without running it"
    with mock.patch.object(sys, "argv", [module, *arguments]):
        return _stopped(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))


def _stopped(program: Callable[[], Any]) -> tuple[_Parsed | SystemExit, str]:
    """Runs a program up to the end of its parsing; returns how that ended, and what was printed."""
    output = io.StringIO()
    with _stops_after_parsing(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            program()
        except (_Parsed, SystemExit) as stopped:
            return stopped, re.sub(r"\x1b\[[0-9;]*m", "", output.getvalue())
    raise AssertionError("the program has worked without parsing anything")


@contextlib.contextmanager
def _stops_after_parsing() -> Iterator[None]:
    def stops(parser: Callable[..., Any]) -> Callable[..., Any]:
        def parse(*arguments: Any, **options: Any) -> Any:
            raise _Parsed(parser(*arguments, **options))

        return parse

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.dict("os.environ", COLUMNS="200"))
        patches.enter_context(mock.patch("tyro.cli", stops(tyro.cli)))
        subcommands = tyro.extras.subcommand_cli_from_dict
        patches.enter_context(mock.patch("tyro.extras.subcommand_cli_from_dict", stops(subcommands)))
        parse_args = argparse.ArgumentParser.parse_args
        patches.enter_context(mock.patch.object(argparse.ArgumentParser, "parse_args", stops(parse_args)))
        patches.enter_context(warnings.catch_warnings())
        # the module may be imported by another test already
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
        yield
