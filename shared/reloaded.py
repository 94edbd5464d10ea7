"""Values that are made of files, and made anew when the files change."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

Value = TypeVar("Value")

log = logging.getLogger(__name__)


class Reloaded(Generic[Value]):
    """Looks at its files whenever it is asked; any thread may ask.

    A file that is replaced counts as changed, also through a symbolic link, as Kubernetes replaces secrets. Where the
    new ones cannot be used, what was read before stays in use until they change again.
    """

    def __init__(self, files: Sequence[Path], read: Callable[[], Value]) -> None:
        """Reads for the first time.

        Args:
            read: Makes the value; raises ValueError, with a sentence for an operator, where that is impossible.
        """
        self._files = tuple(files)
        self._read = read
        self._lock = threading.Lock()
        # before reading: what changes meanwhile is read again
        self._seen = self._look()
        self._value = read()

    def current(self) -> Value:
        """The value of the files as they are now."""
        with self._lock:
            seen = self._look()
            if seen != self._seen:
                self._seen = seen
                self._read_again()
            return self._value

    def _read_again(self) -> None:
        try:
            self._value = self._read()
        except ValueError as error:
            log.warning("what was read before stays in use: %s", error)
        else:
            log.info("read again: %s", ", ".join(map(str, self._files)))

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_signature(file) for file in self._files]


def _signature(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
