"""`vlcache status`: the workers, the KV bytes they hold, and what compression has saved."""

import argparse
import dataclasses
import importlib
import math
import sys
from typing import Any

from vlcache._server_info import ServerInfo, Totals, Worker
from vlcache._settings import Timeout
from vlcache.cli.options import add_service, client_of
from vlcache.cli.terminal import views_for
from vlcache.formatting import format_bytes, format_share, format_table, to_json

TIMEOUT_S = 10.0
WATCH_PERIOD_S = 1.0
MIN_PERIOD_S = 0.1

_HEADER = (
    "WORKER",
    "ROLE",
    "STATE",
    "MODEL",
    "ADDRESS",
    "RUNNING",
    "WAITING",
    "KV CAPACITY",
    "RESERVED",
    "FILLING",
    "ACTIVE",
    "RETAINED",
)


def add_command(commands: Any) -> None:
    """Adds the command and its options to the parser."""
    parser = commands.add_parser("status", help="show workers and KV bytes", description=__doc__)
    parser.set_defaults(run=run)
    add_service(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    how.add_argument(
        "--watch",
        nargs="?",
        type=_period,
        const=WATCH_PERIOD_S,
        metavar="SECONDS",
        help="show it live until ctrl-C, asking again after so many seconds (default: %(const)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Asks and prints. Raises VlcacheError; ValueError for `--watch` without rich or without a terminal."""
    if args.watch is not None:
        return _watch_module().watch(args)
    with client_of(args, Timeout(total_s=TIMEOUT_S)) as client:
        info = client.info()
    if args.json:
        print(_json(info))
    elif (views := views_for(sys.stdout)) is not None:
        views.show(views.status_view(info, _totals_line(info.totals)))
    else:
        print(_text(info))
    return None


def _watch_module() -> Any:
    """The live view; the only part of the client that needs rich."""
    try:
        return importlib.import_module("vlcache.cli.watch")
    except ImportError as error:
        raise ValueError(f"--watch needs rich: pip install 'vlcache[cli]' ({error})") from error


def _period(text: str) -> float:
    period_s = float(text)
    if not MIN_PERIOD_S <= period_s < math.inf:
        raise argparse.ArgumentTypeError(f"at least {MIN_PERIOD_S} seconds, not {text}")
    return period_s


def _json(info: ServerInfo) -> str:
    document = dataclasses.asdict(info)
    document["totals"]["kv_saved_bytes"] = info.totals.kv_saved_bytes
    return to_json(document)


def _text(info: ServerInfo) -> str:
    table = format_table(_HEADER, [_row(worker) for worker in info.workers])
    return f"vlcache {info.version}\n\n{table}\n\n{_totals_line(info.totals)}"


def _row(worker: Worker) -> tuple[str, ...]:
    return (
        worker.name,
        worker.role,
        worker.state,
        worker.model,
        worker.address,
        str(worker.requests_running),
        str(worker.requests_waiting),
        *(format_bytes(num_bytes) for num_bytes in dataclasses.astuple(worker.kv)),
    )


def _totals_line(totals: Totals) -> str:
    saved_share = format_share(totals.kv_saved_bytes, totals.kv_full_bytes)
    return (
        f"{totals.requests} requests: KV {format_bytes(totals.kv_full_bytes)} full, "
        f"{format_bytes(totals.kv_kept_bytes)} kept, {format_bytes(totals.kv_sent_bytes)} sent, "
        f"{format_bytes(totals.kv_saved_bytes)} saved ({saved_share})"
    )
