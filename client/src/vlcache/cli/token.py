"""`vlcache token`: a new token for a tenant on stdout, and on stderr the line for the router's file of tokens.

TOKEN=$(vlcache token team-a 2>>tokens.txt) keeps both.
"""

import argparse
import hashlib
import secrets
import sys
from typing import Any

from vlcache._caller import caller_metadata
from vlcache.cli.options import add_json
from vlcache.formatting import to_json

TOKEN_BYTES = 32


def add_command(commands: Any) -> None:
    """Adds the command and its options to the parser."""
    parser = commands.add_parser("token", help="make a token for a tenant", description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("tenant", help="1 to 64 of [A-Za-z0-9._-]")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Makes and prints. Raises ValueError when that is no tenant's name."""
    caller_metadata(args.tenant, None)
    token = secrets.token_urlsafe(TOKEN_BYTES)
    line = f"{args.tenant} {hashlib.sha256(token.encode()).hexdigest()}"
    if args.json:
        print(to_json({"tenant": args.tenant, "token": token, "line": line}))
        return
    print(line, file=sys.stderr)
    print(token)
