"""What the commands draw with rich."""

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from vlcache._completion import Completion
from vlcache._display import text_bar
from vlcache._server_info import ServerInfo
from vlcache._summary import kv_texts, latencies_text, tokens_text
from vlcache.cli.dashboard import legend, workers_table


def show(view: RenderableType, *, stderr: bool = False) -> None:
    """Draws it once."""
    Console(stderr=stderr).print(view)


def cost_view(completion: Completion) -> RenderableType:
    """What an answer cost, with a bar of the KV kept."""
    timings, compression = completion.timings, completion.compression
    lines = Table.grid(padding=(0, 1))
    lines.add_row(Text("tokens", style="dim"), tokens_text(completion.usage).replace(" | ", ", "))
    kv = " | ".join(kv_texts(compression, completion.transfer))
    if compression is not None:
        lines.add_row(Text(text_bar(compression.realised_retention, 10), style="cyan"), kv)
    elif kv:
        lines.add_row("", kv)
    latencies = latencies_text(timings.ttft_s, timings.ttst_s, timings.itl_s)
    lines.add_row(Text("time", style="dim"), latencies)
    return lines


def status_view(info: ServerInfo, totals: str) -> RenderableType:
    """The workers with their memory, and the sums in words."""
    head = Text(f"vlcache {info.version}  ", style="bold")
    head.append(f"{info.requests_running} running, {info.requests_waiting} waiting for memory", style="not bold cyan")
    table = workers_table(info.workers, Console().width)
    return Group(head, Text(), table, Text(), legend(), Text(totals))


def figures_view(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> RenderableType:
    """A table of figures, names on the left."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold dim", box=None)
    for at, name in enumerate(header):
        table.add_column(name, justify="right" if at else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
