"""Ctrl-C that ends one thing and leaves the program as it is."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Interrupted:
    """Whether ctrl-C was pressed."""

    def __init__(self) -> None:
        self.happened = False


@contextlib.contextmanager
def on_interrupt(action: Callable[[], Any]) -> Iterator[Interrupted]:
    """Does `action` at ctrl-C while the context lasts; only in the main thread.

    A KeyboardInterrupt may come between any two steps of gRPC, which then leaves locks behind that the next call on the
    same channel waits for. For the same reason `action` runs in a thread of its own.
    """
    interrupted = Interrupted()

    def handle(*_: object) -> None:
        interrupted.happened = True
        threading.Thread(target=action, daemon=True).start()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
