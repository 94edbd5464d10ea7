"""Where the traces of a process go: nowhere, unless an endpoint is named."""

from __future__ import annotations

import importlib
import re
from typing import Any, Protocol

from shared.telemetry.span import NO_SPAN, Attributes, Metadata, Span

# By name: without an endpoint nothing of OpenTelemetry is loaded.
EXPORTER = "shared.telemetry.otlp"
ENDPOINT = re.compile(r"(?:(?P<scheme>https?)://)?(?P<address>[^/\s]+:[0-9]{1,5})/?")


class Tracer(Protocol):
    """Of one role of a process."""

    def begin(self, name: str, metadata: Metadata, attributes: Attributes) -> Span:
        """The span of a request that has just come with the call's `metadata`; a child of the span that they name."""

    async def close(self) -> None:
        """Sends what is left, within a time limit."""


class _NoTracer:
    def begin(self, name: str, metadata: Metadata, attributes: Attributes) -> Span:
        """None at all."""
        return NO_SPAN

    async def close(self) -> None:
        """Nothing is left."""


NO_TRACER: Tracer = _NoTracer()


def check_endpoint(endpoint: str) -> None:
    """What can be known before a model is loaded.

    Raises:
        ValueError: Nothing could be sent to `endpoint`, and why.
    """
    split_endpoint(endpoint)
    _exporter()


def split_endpoint(endpoint: str) -> tuple[str, bool]:
    """`host:port` of an endpoint, and whether it is spoken to over TLS.

    Raises:
        ValueError: It has another form.
    """
    match = ENDPOINT.fullmatch(endpoint)
    if match is None:
        raise ValueError(f"an OTLP endpoint is host:port, http://host:port or https://host:port, not {endpoint!r}")
    return match["address"], match["scheme"] == "https"


def open_tracer(endpoint: str, *, role: str, name: str, share: float | None = None) -> Tracer:
    """The tracer of a process.

    Args:
        endpoint: Of an OTLP receiver; nothing is traced when empty.
        role: router, prefill or decode.
        name: Of the process, or of its half.
        share: How many of the requests that come without a trace begin one; None: there, no trace begins.

    Raises:
        ValueError: See `check_endpoint`.
    """
    if not endpoint:
        return NO_TRACER
    tracer: Tracer = _exporter().OtlpTracer(endpoint, role=role, name=name, share=share)
    return tracer


def _exporter() -> Any:
    try:
        return importlib.import_module(EXPORTER)
    except ImportError as error:
        raise ValueError(f"traces need OpenTelemetry: pip install '.[traces]' ({error})") from error
