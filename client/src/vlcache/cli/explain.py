"""`vlcache explain`: draws which visual tokens were kept for a question, and what each layer kept."""

import argparse
import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

from vlcache._settings import Timeout
from vlcache.cli.ask import summary
from vlcache.cli.options import add_question, client_of, compression_of, sampling_of


def add_command(commands: Any) -> None:
    """Adds the command and its options to the parser."""
    parser = commands.add_parser("explain", help="draw which visual tokens were kept", description=__doc__)
    parser.set_defaults(run=run)
    add_question(parser)
    parser.add_argument("-o", "--out", default="explain.png", metavar="FILE", help="the picture (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Asks, prints and draws.

    Raises VlcacheError, OSError for an unreadable image or picture, ValueError for a bad option, for an answer of which
    nothing was dropped, and without Pillow.
    """
    picture = _picture_module()
    images = [Path(path).read_bytes() for path in args.image]
    with client_of(args, Timeout(total_s=args.timeout), tenant=args.tenant) as client:
        completion = client.generate(
            args.question,
            images=images,
            model=args.model,
            sampling=sampling_of(args),
            compression=dataclasses.replace(compression_of(args), explain=True),
            priority=args.priority,
        )
    print(completion.text, flush=True)
    picture.draw(args.question, completion, images).save(args.out, optimize=True)
    print(f"{summary(completion)}\n{args.out}", file=sys.stderr)


def _picture_module() -> Any:
    """What draws; the only part of the client that needs Pillow."""
    try:
        return importlib.import_module("vlcache.explain.picture")
    except ImportError as error:
        raise ValueError(f"drawing needs Pillow: pip install 'vlcache[explain]' ({error})") from error
