"""`python -m deploy.flags`: writes the flags of every service into docs/flags.md, from their configurations."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from decode_worker.config import DecodeConfig
from deploy.combined.config import CombinedConfig
from deploy.local.serve import ServeConfig
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig
from shared.flags import Flag, flags_of, grouped

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "flags.md"
BEGIN, END = "<!-- flags: written by `make docs` -->", "<!-- end of flags -->"

SERVICES: dict[str, type[Any]] = {
    "python -m router": RouterConfig,
    "python -m prefill_worker": PrefillConfig,
    "python -m decode_worker": DecodeConfig,
    "python -m deploy.combined": CombinedConfig,
}
# Of which `--config` is no flag: it hands its own to the services.
LAUNCHER = {"vlcache serve": ServeConfig}


def with_flags(page: str) -> str:
    """The page, with what lies between its marks written anew.

    Raises:
        ValueError: It has not exactly one pair of marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in after or END in after:
        raise ValueError(f"a page needs one {BEGIN} and one {END} behind it")
    return f"{before}{BEGIN}\n{_lists()}\n{END}{after}"


def _lists() -> str:
    services = {**SERVICES, **LAUNCHER}
    return "\n".join(line for command, config in services.items() for line in _list(command, config))


def _list(command: str, config: type[Any]) -> Iterator[str]:
    yield from ("", f"## `{command}`")
    for group, flags in grouped(flags_of(config)):
        yield from ("", f"**{group.name}**: {group.says}", "") if group else ("",)
        yield from ("| flag | default | |", "|---|---|---|", *map(_row, flags))
    yield ""


def _row(flag: Flag) -> str:
    return f"| `{flag.name}` | {_default(flag)} | {flag.help} |".replace("|  |", "| |")


def _default(flag: Flag) -> str:
    """What is done without the flag, the same on every machine."""
    if flag.required:
        return "required"
    if isinstance(flag.default, bool):
        return "on" if flag.default else "off"
    if flag.default in (None, "", ()):
        return ""
    return f"`{flag.default}`".replace(f"{ROOT}/", "").replace(tempfile.gettempdir(), "$TMPDIR")


def main() -> int:
    """Writes the page; returns the exit code."""
    PAGE.write_text(with_flags(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
