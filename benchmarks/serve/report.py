"""The figures for people: tables and ratios."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlcache.formatting import format_bytes

from benchmarks.report import table

Rows = Sequence[dict[str, Any]]

LATENCY_NAMES = ("ttft", "ttst", "tpot", "itl", "e2el")


def ratios(rows: Rows) -> dict[str, Any]:
    """The smallest retention against the largest: best over all loads, each at its own, and load by load.

    None where there is nothing to divide by.
    """
    loads = list(dict.fromkeys(row["load"] for row in rows))
    by_load = [{"load": load, **_ratios([row for row in rows if row["load"] == load])} for load in loads]
    return {**_ratios(rows), "by_load": by_load}


def _ratios(rows: Rows) -> dict[str, float | None]:
    retentions = [row["retention"] for row in rows]
    kept = [row for row in rows if row["retention"] == min(retentions)]
    full = [row for row in rows if row["retention"] == max(retentions)]
    keys = {"goodput_ratio": "request_goodput", "throughput_ratio": "request_throughput"}
    return {name: _divide(_best(kept, key), _best(full, key)) for name, key in keys.items()}


def _best(rows: Rows, key: str) -> float:
    return max(row[key] or 0.0 for row in rows)


def _divide(kept: float, full: float) -> float | None:
    return kept / full if full else None


def tables(rows: Rows) -> str:
    """Everything that a reader compares, as Markdown."""
    return "\n\n".join((_throughputs(rows), _latencies(rows), _memory(rows)))


def _throughputs(rows: Rows) -> str:
    header = ["load", "retention", "completed", "failed", "duration s", "goodput req/s", "req/s", "output tok/s"]
    keys = ("duration", "request_goodput", "request_throughput", "output_throughput")
    lines = [
        [*_name(row), str(row["completed"]), _failures(row), *(_number(row[key], digits=2) for key in keys)]
        for row in rows
    ]
    return table(header, lines)


def _latencies(rows: Rows) -> str:
    header = ["load", "retention", *(f"{name.upper()} ms" for name in LATENCY_NAMES)]
    lines = [[*_name(row), *(_latency(row, name) for name in LATENCY_NAMES)] for row in rows]
    return "median / p99 of\n\n" + table(header, lines)


def _memory(rows: Rows) -> str:
    header = ["load", "retention", "KV full", "sent", "saved", "one sequence", "pool in use", "decoding", "prefilling"]
    means = ("mean_decoding", "mean_prefilling")
    lines = [
        [
            *_name(row),
            *(format_bytes(row[f"kv_{name}_bytes"]) for name in ("full", "sent", "saved")),
            "-" if row["kv_bytes_per_sequence"] is None else format_bytes(row["kv_bytes_per_sequence"]),
            "-" if row["mean_kv_used_share"] is None else f"{100 * row['mean_kv_used_share']:.0f} %",
            *(_number(row[key], digits=1) for key in means),
        ]
        for row in rows
    ]
    return "KV of all prompts; then means over time: pool, sequences being decoded, prompts being computed\n\n" + table(
        header, lines
    )


def _name(row: dict[str, Any]) -> list[str]:
    return [row["load"], f"{row['retention']:g}"]


def _failures(row: dict[str, Any]) -> str:
    return ", ".join(f"{count} {code}" for code, count in row["failed_by_code"].items()) or "0"


def _latency(row: dict[str, Any], name: str) -> str:
    return f"{_number(row[f'median_{name}_ms'], digits=1)} / {_number(row[f'p99_{name}_ms'], digits=1)}"


def _number(value: float | None, *, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
