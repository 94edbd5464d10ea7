"""What `vlcache status --watch` draws: a line of the service, a table of its workers, and sums with their rates."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from vlcache._server_info import KVBytes, ServerInfo, Totals, Worker
from vlcache.formatting import format_bytes, format_share

STATE_STYLES = {"ready": "green", "draining": "yellow", "unreachable": "red"}
# In the order in which memory passes through them; told apart without colours, too.
KV_MARKS = {"reserved": ("▒", "blue"), "filling": ("▓", "magenta"), "active": ("█", "green"), "retained": ("▚", "cyan")}
FREE_MARK = ("·", "dim")
# On a narrower terminal these columns make room for the names and the bars.
FROM_WIDTH = {"ADDRESS": 130, "MODEL": 100, "IN USE": 80, "ROLE": 60}


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One look at a service.

    at_s: when, in monotonic seconds.
    info: what it said; None when it did not answer, and `trouble` is why.
    """

    at_s: float
    info: ServerInfo | None
    trouble: str = ""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What happened per second between two looks; KV in bytes."""

    requests: float
    tokens: float
    kv_full_bytes: float
    kv_kept_bytes: float
    kv_saved_bytes: float


def rates_between(before: Moment | None, now: Moment) -> Rates | None:
    """None without two answers of one router: one that was started again counts from 0."""
    if before is None or before.info is None or now.info is None or now.at_s <= before.at_s:
        return None
    old, new, seconds = before.info.totals, now.info.totals, now.at_s - before.at_s
    if new.requests < old.requests or new.generated_tokens < old.generated_tokens:
        return None
    return Rates(
        requests=(new.requests - old.requests) / seconds,
        tokens=(new.generated_tokens - old.generated_tokens) / seconds,
        kv_full_bytes=(new.kv_full_bytes - old.kv_full_bytes) / seconds,
        kv_kept_bytes=(new.kv_kept_bytes - old.kv_kept_bytes) / seconds,
        kv_saved_bytes=(new.kv_saved_bytes - old.kv_saved_bytes) / seconds,
    )


class Dashboard:
    """Drawn anew whenever the terminal is refreshed, in the size that it then has."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._now: Moment | None = None
        self._heard: Moment | None = None
        self._rates: Rates | None = None

    def take(self, moment: Moment) -> None:
        """Shows this from now on; without an answer, the last one stays, marked as old."""
        self._now = moment
        if moment.info is not None:
            self._rates = rates_between(self._heard, moment)
            self._heard = moment

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Group(*self._parts(options.max_width))

    def _parts(self, width: int) -> Iterator[RenderableType]:
        yield self._headline()
        if self._heard is None or self._heard.info is None:
            return
        info = self._heard.info
        yield Text()
        yield workers_table(info.workers, width)
        yield Text()
        yield _sums(info.totals, self._rates)
        yield Text()
        yield legend("ctrl-C ends")

    def _headline(self) -> Text:
        line = Text(f"vlcache at {self._address}  ", style="bold", no_wrap=True, overflow="ellipsis")
        if self._now is None:
            return line.append("connecting", style="yellow")
        if self._now.info is None:
            since = "" if self._heard is None else f", last heard {time.monotonic() - self._heard.at_s:.0f} s ago"
            return line.append(f"unreachable{since}", style="red").append(f"  {self._now.trouble}", style="dim")
        info = self._now.info
        line.append(f"{info.version}  ", style="not bold")
        line.append(f"{info.requests_running} running, {info.requests_waiting} waiting for memory", style="cyan")
        rate = "-" if self._rates is None else f"{self._rates.tokens:.0f}"
        return line.append(f"  {rate} tokens/s", style="cyan")


def workers_table(workers: tuple[Worker, ...], width: int) -> Table:
    """A row for each worker; narrow terminals have fewer columns."""
    shown = [name for name in _COLUMNS if width >= FROM_WIDTH.get(name, 0)]
    table = Table(box=None, expand=True, pad_edge=False, header_style="bold dim")
    for name in shown:
        if name == "KV MEMORY":
            table.add_column(name, ratio=1, min_width=10)
        else:
            justify: JustifyMethod = "right" if name in ("RUN", "WAIT", "IN USE") else "left"
            table.add_column(name, justify=justify, no_wrap=True, overflow="ellipsis")
    for worker in workers:
        cells = dict(zip(_COLUMNS, _cells(worker), strict=True))
        table.add_row(*(cells[name] for name in shown))
    return table


_COLUMNS = ("WORKER", "ROLE", "STATE", "MODEL", "ADDRESS", "RUN", "WAIT", "KV MEMORY", "IN USE")


def _cells(worker: Worker) -> Iterator[RenderableType]:
    yield worker.name
    yield worker.role
    yield Text(worker.state, style=STATE_STYLES.get(worker.state, ""))
    yield worker.model
    yield worker.address
    yield str(worker.requests_running)
    yield str(worker.requests_waiting)
    yield MemoryBar(worker.kv)
    used = sum(getattr(worker.kv, state) for state in KV_MARKS)
    yield f"{format_bytes(used)} of {format_bytes(worker.kv.capacity)}"


@dataclass(frozen=True)
class MemoryBar:
    """KV memory as wide as there is room: its states one after the other, then what is free."""

    kv: KVBytes

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        bar = Text(no_wrap=True)
        for (mark, style), cells in self._cells(options.max_width):
            bar.append(mark * cells, style=style)
        yield bar

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(4, options.max_width)

    def _cells(self, width: int) -> Iterator[tuple[tuple[str, str], int]]:
        """Cells per mark. Ends are rounded, so that the sum is right; what is there has a cell, if there is room."""
        capacity, drawn, used = max(1, self.kv.capacity), 0, 0
        for state, mark in KV_MARKS.items():
            held = getattr(self.kv, state)
            used += held
            end = min(width, max(round(width * used / capacity), drawn + bool(held)))
            yield mark, end - drawn
            drawn = end
        yield FREE_MARK, width - drawn


def _sums(totals: Totals, rates: Rates | None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold dim")
    for name in ("", "IN ALL", "PER SECOND", ""):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    per_second = rates or Rates(requests=0, tokens=0, kv_full_bytes=0, kv_kept_bytes=0, kv_saved_bytes=0)

    def add(what: str, total: str, rate: str, note: str = "") -> None:
        table.add_row(what, total, "-" if rates is None else rate, Text(note, style="dim"))

    add("requests", str(totals.requests), f"{per_second.requests:.1f}")
    add("tokens", str(totals.generated_tokens), f"{per_second.tokens:.1f}")
    add("KV full", format_bytes(totals.kv_full_bytes), _bytes_rate(per_second.kv_full_bytes))
    add("KV kept", format_bytes(totals.kv_kept_bytes), _bytes_rate(per_second.kv_kept_bytes))
    saved = format_share(totals.kv_saved_bytes, totals.kv_full_bytes)
    add("KV saved", format_bytes(totals.kv_saved_bytes), _bytes_rate(per_second.kv_saved_bytes), f"{saved} of full")
    return table


def _bytes_rate(per_second: float) -> str:
    return f"{format_bytes(round(per_second))}/s"


def legend(note: str = "") -> Text:
    """What the marks of the bars mean."""
    line = Text("KV memory: ", no_wrap=True, overflow="ellipsis")
    for state, (mark, style) in KV_MARKS.items():
        line.append(f"{mark} {state}  ", style=style)
    return line.append(f"· free   {note}".rstrip(), style="dim")
