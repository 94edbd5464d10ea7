"""`vlcache certs`: a CA for development, and a certificate for every role; called again, it renews those."""

import argparse
import importlib
from pathlib import Path
from typing import Any

from vlcache.cli.options import add_json
from vlcache.formatting import to_json


def add_command(commands: Any) -> None:
    """Adds the command and its options to the parser."""
    parser = commands.add_parser("certs", help="make certificates for a service of one's own", description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("folder", help="where ca.pem, ca.key and NAME.pem, NAME.key are written")
    parser.add_argument(
        "--hosts", nargs="+", metavar="HOST", help="names and addresses of the services (default: this machine's own)"
    )
    parser.add_argument("--days", type=int, metavar="N", help="how long certificates are valid (default: 90)")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Writes and says what. Raises OSError for a folder that cannot be written, ValueError without cryptography."""
    if args.days is not None and args.days < 1:
        raise ValueError(f"--days must be at least 1, not {args.days}")
    chosen = {name: value for name, value in (("hosts", args.hosts), ("days", args.days)) if value is not None}
    files = [str(file) for file in _authority_module().make_certificates(Path(args.folder), **chosen)]
    print(to_json({"files": files}) if args.json else "\n".join(files))


def _authority_module() -> Any:
    """What signs; the only part of the client that needs cryptography."""
    try:
        return importlib.import_module("vlcache.certs.authority")
    except ImportError as error:
        raise ValueError(f"certificates need cryptography: pip install 'vlcache[certs]' ({error})") from error
