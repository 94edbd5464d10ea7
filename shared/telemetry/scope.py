"""Whose work is being done: what log lines name and what spans belong to.

A call enters the scope of its request where it comes in; tasks inherit it, and `shared.threads` takes it into threads.
What serves many requests at once, such as a step of a batch or the stream of everybody's tokens, is nobody's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from shared.telemetry.span import NO_SPAN, Span


@dataclass(frozen=True, kw_only=True)
class Scope:
    """One request at one service."""

    request_id: str = ""
    """Empty where the work is nobody's."""
    span: Span = NO_SPAN


NOBODY = Scope()

_scope: ContextVar[Scope] = ContextVar("scope", default=NOBODY)


def current() -> Scope:
    """The scope of whoever calls."""
    return _scope.get()


def enter(scope: Scope) -> None:
    """From here to the end of this task, in tasks that it starts, and in the log lines about its failure."""
    _scope.set(scope)


@contextlib.contextmanager
def within(scope: Scope) -> Iterator[None]:
    """While open; for what is done on behalf of somebody else. No generator may be suspended within."""
    token = _scope.set(scope)
    try:
        yield
    finally:
        _scope.reset(token)
