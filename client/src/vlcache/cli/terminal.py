"""Where output goes: drawn by rich on a terminal that has it, plain text elsewhere."""

import importlib
import importlib.util
import sys
from typing import Any

from vlcache._completion import Completion


def views_for(stream: Any) -> Any | None:
    """`vlcache.cli.views` where `stream` is a terminal and there is rich; None where text has to be plain."""
    if not stream.isatty() or not has_rich():
        return None
    return importlib.import_module("vlcache.cli.views")


def has_rich() -> bool:
    """Whether rich is installed."""
    return importlib.util.find_spec("rich") is not None


def say_cost(completion: Completion) -> None:
    """What an answer cost, on stderr."""
    views = views_for(sys.stderr)
    if views is None:
        print(completion.summary(), file=sys.stderr)
    else:
        views.show(views.cost_view(completion), stderr=True)
