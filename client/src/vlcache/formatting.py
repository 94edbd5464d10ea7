"""How numbers, tables and JSON are written, by commands and summaries alike."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_bytes(num_bytes: int) -> str:
    """Bytes with three or four digits and a binary unit: 1536 → "1.5 KiB"."""
    value = float(num_bytes)
    for unit in _UNITS[:-1]:
        # 1023.95 would be written as 1024.0
        if abs(value) < 1023.95:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} {_UNITS[-1]}"


def format_ms(seconds: float | None) -> str:
    """Seconds as milliseconds; "-" for None."""
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def format_share(part: float, whole: float) -> str:
    """`part` of `whole` in percent; "-" of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def to_json(document: Any) -> str:
    """One line of JSON; dataclasses within become objects."""
    return json.dumps(document, default=dataclasses.asdict)
