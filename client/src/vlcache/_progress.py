"""How far long work is: a bar on a terminal or in a notebook, nothing in a pipe."""

import contextlib
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

Advance = Callable[[], Any]
"""Says that one more is done; from any thread."""


def progress_bar(what: str, total: int, *, shown: bool) -> AbstractContextManager[Advance]:
    """A bar of `total` steps on stderr while the context lasts.

    Raises ValueError when it is to be shown and there is no rich.
    """
    if not shown:
        return contextlib.nullcontext(lambda: None)
    try:
        bars = importlib.import_module("vlcache._progress_bar")
    except ImportError as error:
        raise ValueError(f"progress bars need rich: pip install 'vlcache[cli]' ({error})") from error
    return bars.progress_bar(what, total)
