"""`python -m deploy.operations`: writes the table of metrics of docs/operations.md from the code."""

from __future__ import annotations

import sys
from pathlib import Path

from shared.telemetry.metrics import DecodeMetrics, PrefillMetrics, RouterMetrics
from shared.telemetry.role_metrics import Description, RoleMetrics

PAGE = Path(__file__).parents[1] / "docs" / "operations.md"
BEGIN, END = "<!-- metrics: written by `make docs` -->", "<!-- end of metrics -->"


def with_metrics(page: str) -> str:
    """The page, with what lies between its marks written anew.

    Raises:
        ValueError: It has not exactly one pair of marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in after or END in after:
        raise ValueError(f"a page needs one {BEGIN} and one {END} behind it")
    return f"{before}{BEGIN}\n{_table()}\n{END}{after}"


def _table() -> str:
    roles_of: dict[Description, list[str]] = {}
    for role in _roles():
        for each in role.described:
            roles_of.setdefault(each, []).append(role.role)
    rows = [_row(each, roles) for each, roles in roles_of.items()]
    return "\n".join(["| metric | of | kind | labels | |", "|---|---|---|---|---|", *rows])


def _roles() -> tuple[RoleMetrics, ...]:
    return RouterMetrics(worker=""), PrefillMetrics(worker="", model=""), DecodeMetrics(worker="", model="")


def _row(metric: Description, roles: list[str]) -> str:
    of = "all" if len(roles) == len(_roles()) else ", ".join(roles)
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {of} | {metric.kind} | {labels} | {metric.text} |"


def main() -> int:
    """Writes the page; returns the exit code."""
    PAGE.write_text(with_metrics(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
