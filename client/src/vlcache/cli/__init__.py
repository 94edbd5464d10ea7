"""The command `vlcache`: start a service, ask it, measure it, see what it keeps and how it does, make it safe."""

import argparse
import sys
from collections.abc import Sequence

from vlcache._errors import VlcacheError
from vlcache.cli import ask, bench, certs, chat, completion, explain, serve, status, token
from vlcache.cli.hints import describe

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count
COMMANDS = (serve, ask, chat, status, bench, explain, certs, token, completion)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. Errors are one line on stderr, with what helps in a second one."""
    parser = _parser()
    completion.complete(parser)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (VlcacheError, OSError, ValueError) as error:
        print(describe(error, args), file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ValueError) else EXIT_FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlcache", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        command.add_command(commands)
    return parser
