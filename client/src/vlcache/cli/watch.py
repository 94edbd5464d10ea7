"""`vlcache status --watch`: the workers and their memory as they are now, until ctrl-C."""

import argparse
import time

from rich.console import Console
from rich.live import Live

from vlcache._client import Client
from vlcache._errors import VlcacheError
from vlcache._settings import RetryPolicy, Timeout
from vlcache.cli.dashboard import Dashboard, Moment
from vlcache.cli.options import client_of

# A service that does not answer is shown to be unreachable; the next look comes anyway.
MAX_WAIT_S = 5.0


def watch(args: argparse.Namespace, console: Console | None = None) -> None:
    """Shows the service that `args` name and asks it every `args.watch` seconds. Returns at ctrl-C.

    Raises ValueError when there is no terminal to show it on.
    """
    console = console or Console()
    if not console.is_terminal:
        raise ValueError("--watch needs a terminal; --json prints the state once for a program")
    dashboard, period_s = Dashboard(args.address), args.watch
    timeout = Timeout(connect_s=MAX_WAIT_S, total_s=max(period_s, MAX_WAIT_S))
    try:
        with (
            client_of(args, timeout, retry=RetryPolicy(max_attempts=1)) as client,
            Live(console=console, screen=True, get_renderable=lambda: dashboard, refresh_per_second=4),
        ):
            while True:
                dashboard.take(_look(client))
                time.sleep(period_s)
    except KeyboardInterrupt:
        return


def _look(client: Client) -> Moment:
    try:
        info = client.info()
    except VlcacheError as error:
        return Moment(at_s=time.monotonic(), info=None, trouble=str(error))
    return Moment(at_s=time.monotonic(), info=info)
