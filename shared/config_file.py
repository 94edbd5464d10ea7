"""`--config FILE`: flags in YAML, by the names that they have on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from shared.flags import Flag

NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text (in quotes where YAML would read something else)",
    Path: "a path",
    NoneType: "null",
}


def read_config_file(path: Path, flags: Sequence[Flag]) -> dict[str, Any]:
    """What the file says, by field.

    Raises:
        ValueError: It cannot be read, is no mapping, or has a key or a value that is none of `flags`; says which.
    """
    known = {flag.field: flag for flag in flags}
    found: dict[str, Any] = {}
    for key, value in _pairs(path):
        field = str(key).replace("-", "_")
        if field not in known:
            raise ValueError(f"{path}: there is no flag {key!r}")
        if field in found:
            raise ValueError(f"{path}: {key} stands there twice")
        try:
            found[field] = _fitted(known[field].hint, value)
        except ValueError as error:
            raise ValueError(f"{path}: {key} must be {error}, not {value!r}") from error
    return found


def _pairs(path: Path) -> list[tuple[Any, Any]]:
    """Keys and values as they stand there; a dict would keep the last one of equal keys without a word."""
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{path}: flags are a mapping, such as `port: 50051`")
        return [(loader.construct_object(key), loader.construct_object(value, deep=True)) for key, value in node.value]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def _fitted(hint: Any, value: Any) -> Any:
    """The value as a field of that type holds it.

    Raises:
        ValueError: It is of another type; says which ones there are.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _first_fit(arguments, value)
    if origin is Literal:
        return _one_of(arguments, value)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"a list, each entry {NAMES[arguments[0]]}")
        return tuple(_fitted(arguments[0], each) for each in value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) is int:
        return float(value)
    # a bool is an int to isinstance
    if type(value) is not hint:
        raise ValueError(NAMES[hint])
    return value


def _first_fit(hints: Sequence[Any], value: Any) -> Any:
    wanted = []
    for hint in hints:
        try:
            return _fitted(hint, value)
        except ValueError as error:
            wanted.append(str(error))
    raise ValueError(" or ".join(wanted))


def _one_of(choices: Sequence[str], value: Any) -> Any:
    if value not in choices:
        raise ValueError("one of " + ", ".join(choices))
    return value
