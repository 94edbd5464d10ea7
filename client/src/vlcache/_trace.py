"""The trace of the caller's program: its active span becomes the parent of what the service does for a request."""

import importlib
import sys


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """W3C trace context of the active span; empty where the program has no OpenTelemetry loaded, or is in no span."""
    if "opentelemetry.trace" not in sys.modules:
        return ()
    propagation = importlib.import_module("opentelemetry.trace.propagation.tracecontext")
    carrier: dict[str, str] = {}
    propagation.TraceContextTextMapPropagator().inject(carrier)
    return tuple(carrier.items())
