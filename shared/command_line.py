"""The command line of a process, and the file that it names, become its configuration."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import tyro

from shared.config_file import read_config_file
from shared.flags import Flag, flags_of, grouped

Config = TypeVar("Config")

EXIT_USAGE = 2
# What stands for a value: what its type says, or of numbers the end of the flag's name.
METAVARS = {str: "TEXT", Path: "PATH", int: "N", float: "NUMBER"}
UNITS = {"_s": "SECONDS", "_mib": "MIB", "_tokens": "TOKENS", "_model_len": "TOKENS", "port": "PORT"}

# "(default: )" would say less
NO_DEFAULT = "(default: none)"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where flags may stand besides the command line."""

    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint=NO_DEFAULT)] = None
    """YAML with flags by the same names, such as `max-num-seqs: 32`; what the command line says wins."""


def parse_config(config: type[Config], description: str) -> Config:
    """Builds a configuration from the command line and the file that `--config` names.

    Raises:
        SystemExit: With code 2 where something is wrong, which is said; with 0 after `--help`.
    """
    try:
        flags = flags_of(config)
        form = _form(flags, _of_file(flags))
        parsed = tyro.cli(form, prog=_command(config), description=description, config=(tyro.conf.OmitArgPrefixes,))
        return config(**_values(parsed, flags))
    except ValueError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE) from error


def _command(config: type[Any]) -> str | None:
    """How the process of that configuration is started; None where its own module is what runs."""
    return None if config.__module__ == "__main__" else f"python -m {config.__module__.removesuffix('.config')}"


def _of_file(flags: Sequence[Flag]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path)
    try:
        known, _ = parser.parse_known_args()
    except argparse.ArgumentError:
        # tyro says it in its own words
        return {}
    return read_config_file(known.config, flags) if known.config is not None else {}


def _form(flags: Sequence[Flag], given: Mapping[str, Any]) -> type[Any]:
    """A dataclass of a dataclass per group, which tyro shows in a box of its own."""
    parts = grouped(flags)
    ungrouped = [_field(flag, given) for group, members in parts if group is None for flag in members]
    boxes = [
        (group.name, Annotated[_box(group.name, members, given), tyro.conf.arg(help=group.says)])
        for group, members in parts
        if group is not None
    ]
    return make_dataclass("Form", [*ungrouped, *boxes], bases=(Source,), frozen=True, kw_only=True)


def _box(name: str, flags: Sequence[Flag], given: Mapping[str, Any]) -> type[Any]:
    return make_dataclass(name, [_field(flag, given) for flag in flags], frozen=True, kw_only=True)


def _field(flag: Flag, given: Mapping[str, Any]) -> tuple[str, Any, Any]:
    default = given.get(flag.field, flag.default)
    hint = NO_DEFAULT if default in (None, "", ()) else None
    shown: Any = Annotated[flag.hint, tyro.conf.arg(help=flag.help, metavar=_metavar(flag), help_behavior_hint=hint)]
    return (
        flag.field,
        shown,
        dataclasses.field() if default is dataclasses.MISSING else dataclasses.field(default=default),
    )


def _metavar(flag: Flag) -> str | None:
    """What stands for the value; None where tyro lists what there is."""
    if flag.hint is bool or get_origin(flag.hint) in (Literal, tuple):
        return None
    kind = next((each for each in get_args(flag.hint) if each is not type(None)), flag.hint)
    unit = next((unit for end, unit in UNITS.items() if flag.field.endswith(end)), METAVARS[kind])
    return unit if kind in (int, float) else METAVARS[kind]


def _values(parsed: Any, flags: Sequence[Flag]) -> dict[str, Any]:
    boxes = {flag.field: getattr(parsed, flag.group.name) if flag.group else parsed for flag in flags}
    return {field: getattr(box, field) for field, box in boxes.items()}
