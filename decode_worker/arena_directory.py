"""The arenas of prefill workers on this host, each mapped once."""

from __future__ import annotations

import logging
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from shared.errors import FailedPreconditionError
from shared.kv.arena import ArenaView
from shared.kv.arena_socket import fetch_arena
from shared.threads import run_to_end

log = logging.getLogger(__name__)

# A restarted prefill worker brings a new arena; the mapping of the old one is dropped with the oldest entry.
MAX_ARENAS = 32


class ArenaDirectory:
    """Views by the owner's boot id. Lives on the event loop."""

    def __init__(self) -> None:
        self._views: OrderedDict[str, ArenaView] = OrderedDict()
        # connecting blocks for up to 2 s when something is wrong
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="arena")

    async def find(self, socket_path: str, epoch: str) -> ArenaView | None:
        """The arena of a prefill worker, or None when it is on another host (or cannot be trusted)."""
        if not socket_path:
            return None
        if epoch in self._views:
            self._views.move_to_end(epoch)
            return self._views[epoch]
        try:
            view = await run_to_end(self._thread, lambda: fetch_arena(socket_path, epoch))
        except OSError:
            return None
        except FailedPreconditionError as error:
            log.warning("the arena at %s is refused: %s", socket_path, error.message)
            return None
        self._views[epoch] = view
        while len(self._views) > MAX_ARENAS:
            self._views.popitem(last=False)
        return view

    def close(self) -> None:
        """Drops all views."""
        self._thread.shutdown()
        self._views.clear()
