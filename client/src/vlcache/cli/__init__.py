"""The command `vlcache`: ask a question, see what was kept for it, see how the service does, make it safe."""

import argparse
import sys
from collections.abc import Sequence

from vlcache._errors import VlcacheError
from vlcache.cli import ask, certs, explain, status, token

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. Errors are one line on stderr."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (VlcacheError, OSError) as error:
        return _fail(error, EXIT_FAILED)
    except ValueError as error:
        return _fail(error, EXIT_USAGE)
    return 0


def _fail(error: Exception, exit_code: int) -> int:
    print("vlcache: " + " ".join(str(error).split()), file=sys.stderr)
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlcache", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    ask.add_command(commands)
    explain.add_command(commands)
    status.add_command(commands)
    certs.add_command(commands)
    token.add_command(commands)
    return parser
