"""How far the start of a worker is: bars on a terminal, lines in the log elsewhere."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from tqdm.auto import tqdm

log = logging.getLogger(__name__)

Item = TypeVar("Item")
LOG_PERIOD_S = 10.0


class LoggedProgress(tqdm):  # type: ignore[type-arg]  # generic in its stubs alone
    """In place of a bar that nobody watches: a line in the log every `LOG_PERIOD_S`, and one at the end."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options |= {"mininterval": LOG_PERIOD_S, "file": io.StringIO(), "disable": False}
        options["bar_format"] = "{desc}: {n_fmt} of {total_fmt}, {elapsed}"
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Called by tqdm where it would draw; nothing is told of what has not begun."""
        if self.n:
            log.info("%s", msg or self)


def on_terminal() -> bool:
    """Whether somebody sees bars."""
    return sys.stderr.isatty()


def progress_class() -> type[tqdm[Any]]:
    """A bar for whoever takes tqdm's."""
    return tqdm if on_terminal() else LoggedProgress


def track(items: Sequence[Item], what: str) -> Iterator[Item]:
    """The items; says how many of them are done."""
    return iter(progress_class()(items, desc=what))
