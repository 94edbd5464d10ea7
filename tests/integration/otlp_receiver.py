"""An OTLP receiver for tests: keeps every span that it is sent."""

from __future__ import annotations

import threading
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc


@dataclass(frozen=True, kw_only=True)
class SeenSpan:
    """A span with its ids in hexadecimal, its times in seconds and its attributes without their prefix."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    service: str
    instance: str
    start_s: float
    end_s: float
    error: str
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


class OtlpReceiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Use as a context manager; `address` is where it listens."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[SeenSpan] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> OtlpReceiver:
        self._server.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.stop(grace=None).wait()

    def Export(self, request: Any, context: Any) -> pb.ExportTraceServiceResponse:  # noqa: N802
        with self._lock:
            for resource in request.resource_spans:
                about = _values(resource.resource.attributes)
                for scope in resource.scope_spans:
                    self._spans.extend(_seen(span, about) for span in scope.spans)
        return pb.ExportTraceServiceResponse()

    def spans(self) -> list[SeenSpan]:
        """All that have arrived."""
        with self._lock:
            return list(self._spans)


def _seen(span: Any, about: dict[str, Any]) -> SeenSpan:
    return SeenSpan(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        service=about["service.name"],
        instance=about["service.instance.id"],
        start_s=span.start_time_unix_nano / 1e9,
        end_s=span.end_time_unix_nano / 1e9,
        error=span.status.message,
        attributes=_values(span.attributes),
        events=[(event.name, _values(event.attributes)) for event in span.events],
    )


def _values(attributes: Any) -> dict[str, Any]:
    values = {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
    return {key.removeprefix("vlcache."): value for key, value in values.items()}
