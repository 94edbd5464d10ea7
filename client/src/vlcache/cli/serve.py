"""`vlcache serve [MODEL] [flags]`: router and workers on this machine, in the foreground; ctrl-C drains them.

Flags are those of `python -m deploy.local serve`, which it becomes; `vlcache serve --help` lists them.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import PurePath
from typing import Any

LAUNCHER = "deploy.local"
_MISSING = (
    "only the client is installed in this environment, not the service: in a checkout of vlcache run `make setup`, "
    "then `.venv/bin/vlcache serve`; of a service that runs elsewhere the other commands take the --address"
)


def add_command(commands: Any) -> None:
    """Adds the command; its flags are not ours, so that all are left as they are."""
    parser = commands.add_parser(
        "serve", help="start a service on this machine", description=__doc__, prefix_chars="\0", add_help=False
    )
    parser.set_defaults(run=run)
    parser.add_argument("flags", nargs=argparse.REMAINDER)


def run(args: argparse.Namespace) -> None:
    """Becomes the service. Raises OSError where it is not installed."""
    if importlib.util.find_spec(LAUNCHER.partition(".")[0]) is None or importlib.util.find_spec(LAUNCHER) is None:
        raise OSError(_MISSING)
    command = [sys.executable, "-m", LAUNCHER, "serve", *launcher_flags(args.flags)]
    sys.stdout.flush()
    os.execv(sys.executable, command)  # noqa: S606 - no shell, and the program is this Python


def launcher_flags(flags: list[str]) -> list[str]:
    """The launcher's flags: a leading MODEL becomes its own, and its last part the name that clients ask for."""
    if not flags or flags[0].startswith("-"):
        return flags
    return ["--model", flags[0], "--served-model-name", PurePath(flags[0]).name, *flags[1:]]
