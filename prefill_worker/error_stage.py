"""Where in a request's life an error has happened."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from shared.errors import ServiceError


@contextlib.contextmanager
def at_stage(stage: str) -> Iterator[None]:
    """Errors that pass name the stage, unless they do so themselves."""
    try:
        yield
    except ServiceError as error:
        error.at(stage, worker="")
        raise
