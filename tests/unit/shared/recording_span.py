"""A span that remembers what it was told."""

from __future__ import annotations

from shared.telemetry.span import Attributes


class RecordingSpan:
    def __init__(self, trace_id: str = "") -> None:
        self.trace_id = trace_id
        self.metadata = (("traceparent", trace_id),)
        self.stages: list[tuple[str, float, Attributes, float]] = []
        self.events: list[tuple[str, Attributes]] = []
        self.attributes: dict[str, object] = {}
        self.ends: list[str] = []

    def stage(self, name: str, seconds: float, attributes: Attributes, *, ago_s: float = 0.0) -> None:
        self.stages.append((name, seconds, attributes, ago_s))

    def event(self, name: str, attributes: Attributes) -> None:
        self.events.append((name, attributes))

    def set(self, attributes: Attributes) -> None:
        self.attributes |= attributes

    def end(self, error: str = "") -> None:
        self.ends.append(error)
