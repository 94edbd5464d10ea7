"""Spans over OTLP, by OpenTelemetry's SDK. Loaded only where an endpoint is named (`shared.telemetry.tracer`).

A batch processor sends from a thread of its own out of a bounded queue, which drops spans when it is full: whatever the
receiver does, no request waits for it or fails by it. Headers, certificates and limits of the exporter are
OpenTelemetry's own environment variables (`OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_BSP_MAX_QUEUE_SIZE`, ...).
"""

from __future__ import annotations

import asyncio
import threading
import time

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import Span as SdkSpan
from opentelemetry.trace import SpanKind, Status, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace import Tracer as SdkTracer
from opentelemetry.trace.propagation import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from shared.telemetry.span import NO_SPAN, Attributes, Metadata, Span
from shared.telemetry.tracer import split_endpoint
from shared.version import VERSION

PREFIX = "vlcache."
# At the end of a process, for what is still in the queue.
FLUSH_S = 3.0

W3C = TraceContextTextMapPropagator()


class OtlpTracer:
    """See `Tracer`, and `open_tracer` for the arguments."""

    def __init__(self, endpoint: str, *, role: str, name: str, share: float | None) -> None:
        address, secure = split_endpoint(endpoint)
        resource = Resource.create(
            {"service.name": f"vlcache-{role}", "service.instance.id": name, "service.version": VERSION}
        )
        self._provider = TracerProvider(
            resource=resource, sampler=ParentBasedTraceIdRatio(share or 0.0), shutdown_on_exit=False
        )
        exporter = OTLPSpanExporter(endpoint=address, insecure=not secure)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("vlcache", VERSION)
        self._begins_traces = share is not None

    def begin(self, name: str, metadata: Metadata, attributes: Attributes) -> Span:
        """See `Tracer`."""
        context = W3C.extract({key: value for key, value in metadata if isinstance(value, str)})
        if not self._begins_traces and not get_current_span(context).get_span_context().is_valid:
            return NO_SPAN
        clock_ns = _Clock()
        span = self._tracer.start_span(
            name, context, kind=SpanKind.SERVER, attributes=_prefixed(attributes), start_time=clock_ns()
        )
        return OtlpSpan(self._tracer, span, clock_ns)

    async def close(self) -> None:
        """See `Tracer`. A receiver that is gone must not hold up the end of a process."""
        flushing = threading.Thread(target=self._provider.shutdown, name="flush traces", daemon=True)
        flushing.start()
        await asyncio.get_running_loop().run_in_executor(None, flushing.join, FLUSH_S)


class OtlpSpan:
    """See `Span`."""

    def __init__(self, tracer: SdkTracer, span: SdkSpan, clock_ns: _Clock) -> None:
        self._tracer = tracer
        self._span = span
        self._clock_ns = clock_ns
        self._context = set_span_in_context(span)
        self._open = True
        self.trace_id = format_trace_id(span.get_span_context().trace_id)
        carrier: dict[str, str] = {}
        W3C.inject(carrier, self._context)
        self.metadata: Metadata = tuple(carrier.items())

    def stage(self, name: str, seconds: float, attributes: Attributes, *, ago_s: float = 0.0) -> None:
        """See `Span`."""
        end_ns = self._clock_ns() - round(ago_s * 1e9)
        start_ns = end_ns - round(seconds * 1e9)
        span = self._tracer.start_span(name, self._context, attributes=_prefixed(attributes), start_time=start_ns)
        span.end(end_ns)

    def event(self, name: str, attributes: Attributes) -> None:
        """See `Span`."""
        if self._open:
            self._span.add_event(name, _prefixed(attributes), self._clock_ns())

    def set(self, attributes: Attributes) -> None:
        """See `Span`."""
        if self._open:
            self._span.set_attributes(_prefixed(attributes))

    def end(self, error: str = "") -> None:
        """See `Span`."""
        if not self._open:
            return
        self._open = False
        if error:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end(self._clock_ns())


class _Clock:
    """Unix time in nanoseconds that runs as evenly as the durations of the stages, whatever corrects the wall clock."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def __call__(self) -> int:
        return self._offset_ns + time.monotonic_ns()


def _prefixed(attributes: Attributes) -> Attributes:
    return {PREFIX + name: value for name, value in attributes.items()}
