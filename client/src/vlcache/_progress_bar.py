"""The bar of `_progress`, drawn by rich."""

import contextlib
import functools
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextlib.contextmanager
def progress_bar(what: str, total: int, console: Console | None = None) -> Iterator[Callable[[], None]]:
    """Shown until the context is left, where the console is a terminal or a notebook."""
    console = console or Console(stderr=True)
    is_seen = console.is_terminal or console.is_jupyter
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not is_seen) as progress:
        yield functools.partial(progress.advance, progress.add_task(what, total=total))
