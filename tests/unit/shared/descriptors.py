"""Which file descriptors this process has."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator


def open_descriptors() -> dict[str, str]:
    """Number and target of each open descriptor."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return {number: target for number, target in found.items() if not target.startswith("/proc/")}


@contextlib.contextmanager
def no_descriptor_leaks() -> Iterator[None]:
    gc.collect()
    before = open_descriptors()
    yield
    gc.collect()
    # what closes meanwhile belongs to threads of earlier tests
    leaked = open_descriptors().items() - before.items()
    assert not leaked, f"leaked: {leaked}"
