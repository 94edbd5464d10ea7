"""A request at one service, as a trace shows it; and the one that stands for it while nothing is traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

Value: TypeAlias = "str | bool | int | float"
Attributes: TypeAlias = Mapping[str, Value]
Metadata: TypeAlias = Sequence[tuple[str, "str | bytes"]]


class Span(Protocol):
    """Any thread may call it. Nothing here waits or raises, and nothing is done per token."""

    @property
    def trace_id(self) -> str:
        """Of the whole request, 32 hexadecimal digits; empty where nothing is traced."""

    @property
    def metadata(self) -> Metadata:
        """What a call to another service carries, so that its span becomes a child of this one."""

    def stage(self, name: str, seconds: float, attributes: Attributes, *, ago_s: float = 0.0) -> None:
        """A child that took `seconds` and ended `ago_s` seconds ago."""

    def event(self, name: str, attributes: Attributes) -> None:
        """Something that happened just now."""

    def set(self, attributes: Attributes) -> None:
        """What is known of the request by now."""

    def end(self, error: str = "") -> None:
        """The service has done with the request; `error` is the code that it failed with. Idempotent."""


class _NoSpan:
    trace_id = ""
    metadata: Metadata = ()

    def stage(self, name: str, seconds: float, attributes: Attributes, *, ago_s: float = 0.0) -> None:
        """Nothing."""

    def event(self, name: str, attributes: Attributes) -> None:
        """Nothing."""

    def set(self, attributes: Attributes) -> None:
        """Nothing."""

    def end(self, error: str = "") -> None:
        """Nothing."""


NO_SPAN: Span = _NoSpan()
