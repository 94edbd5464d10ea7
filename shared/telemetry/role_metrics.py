"""What the metrics of all roles have in common: prefix, fixed labels, buckets, a list of what there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from shared.telemetry.scope import current
from shared.telemetry.span import Value
from shared.version import VERSION

Metric = TypeVar("Metric", Counter, Gauge, Histogram)

PREFIX = "vlcache_"
FIXED_LABELS = ("role", "worker", "model")


def geometric_buckets(low_s: float, high_s: float) -> tuple[float, ...]:
    """1, 2.2, 4.7, 10 ... from `low_s` to `high_s`, the ends included."""
    steps = [base * 10.0**power for power in range(-6, 6) for base in (1.0, 2.2, 4.7)]
    inner = [round(step, 9) for step in steps if low_s < step < high_s]
    return (low_s, *inner, high_s)


LATENCY_BUCKETS = geometric_buckets(0.001, 480.0)
TOKEN_GAP_BUCKETS = geometric_buckets(0.001, 80.0)
STAGE_BUCKETS = geometric_buckets(0.0001, 480.0)
RATIO_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
TOKEN_BUCKETS = (0, 64, 256, 576, 1152, 2304, 4608, 9216, 18432, 36864, 73728, 147456)
PIXEL_BUCKETS = (1e4, 1e5, 2.5e5, 5e5, 1e6, 2e6, 4e6, 8e6, 1.6e7, 4e7)


@dataclass(frozen=True, kw_only=True)
class Description:
    """One metric as operators read of it."""

    name: str
    kind: str
    """counter, gauge, histogram or info."""
    labels: tuple[str, ...]
    """Beyond the fixed ones."""
    text: str


class RoleMetrics:
    """Metrics of one role of a process; binds the labels that never change in it."""

    def __init__(self, *, role: str, worker: str, model: str = "") -> None:
        self.role = role
        self.registry = CollectorRegistry()
        self.described: list[Description] = []
        """All of them, in the order of their creation."""
        self._fixed = dict(zip(FIXED_LABELS, (role, worker, model), strict=True))
        info = Info(f"{PREFIX}build", "Version of this process", registry=self.registry)
        info.info({"version": VERSION, **self._fixed})
        self._describe("build_info", "info", "Version of this process", ["version"])
        self.event_loop_delay = self._histogram(
            "event_loop_delay_seconds", "How late the event loop woke up", STAGE_BUCKETS
        )
        self.stage_seconds = self._histogram("stage_seconds", "Time spent in a stage", STAGE_BUCKETS, "stage")

    def observe_stage(self, stage: str, seconds: float, **attributes: Value) -> None:
        """A stage of the request at work has just ended: a duration of its metric, and a span of its trace.

        Args:
            attributes: For the trace alone.
        """
        self.labelled(self.stage_seconds, stage=stage).observe(seconds)
        current().span.stage(stage, seconds, attributes)

    def observe_stages(self, seconds: Mapping[str, float]) -> None:
        """Stages that took turns and have ended together; a trace shows each in one piece, one after the other."""
        ago_s = sum(seconds.values())
        for stage, each_s in seconds.items():
            ago_s = max(0.0, ago_s - each_s)
            self.labelled(self.stage_seconds, stage=stage).observe(each_s)
            current().span.stage(stage, each_s, {}, ago_s=ago_s)

    def labelled(self, metric: Metric, **extra: str) -> Metric:
        """The child of a metric that has labels beyond the fixed ones."""
        return metric.labels(**self._fixed, **extra)

    def forget(self, metric: Counter | Gauge | Histogram, *values: str) -> None:
        """Drops the child with these values of the extra labels: what it was about does not exist any more."""
        metric.remove(*self._fixed.values(), *values)

    def _counter(self, name: str, text: str, *extra: str, starts: Sequence[str | tuple[str, ...]] = ()) -> Counter:
        """`starts` are values of the extra labels that show as 0 from the beginning: a rate needs a value before."""
        metric = Counter(PREFIX + name, text, [*self._fixed, *extra], registry=self.registry)
        return self._made(metric, name, text, extra, starts)

    def _gauge(self, name: str, text: str, *extra: str) -> Gauge:
        metric = Gauge(PREFIX + name, text, [*self._fixed, *extra], registry=self.registry)
        return self._made(metric, name, text, extra)

    def _histogram(
        self, name: str, text: str, buckets: Sequence[float], *extra: str, starts: Sequence[str] = ()
    ) -> Histogram:
        metric = Histogram(PREFIX + name, text, [*self._fixed, *extra], registry=self.registry, buckets=buckets)
        return self._made(metric, name, text, extra, starts)

    def _made(
        self,
        metric: Metric,
        name: str,
        text: str,
        extra: Sequence[str],
        starts: Sequence[str | tuple[str, ...]] = (),
    ) -> Metric:
        self._describe(name, type(metric).__name__.lower(), text, extra)
        for start in starts:
            self.labelled(metric, **dict(zip(extra, (start,) if isinstance(start, str) else start, strict=True)))
        return metric if extra else metric.labels(**self._fixed)

    def _describe(self, name: str, kind: str, text: str, extra: Sequence[str]) -> None:
        self.described.append(Description(name=PREFIX + name, kind=kind, labels=tuple(extra), text=text))
