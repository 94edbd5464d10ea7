"""`vlcache explain`: draws which visual tokens were kept for a question, and what each layer kept."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from vlcache._drawing import picture_module
from vlcache._settings import Timeout
from vlcache.cli.options import add_json, add_question, client_of, compression_of, sampling_of
from vlcache.cli.terminal import say_cost
from vlcache.formatting import to_json


def add_command(commands: Any) -> None:
    """Adds the command and its options to the parser."""
    parser = commands.add_parser("explain", help="draw which visual tokens were kept", description=__doc__)
    parser.set_defaults(run=run)
    add_question(parser)
    parser.add_argument("-o", "--out", default="explain.png", metavar="FILE", help="the picture (default: %(default)s)")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Asks, prints and draws.

    Raises VlcacheError, OSError for an unreadable image or picture, ValueError for a bad option, for an answer of which
    nothing was dropped, and without Pillow.
    """
    picture_module()  # before anything is asked
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
    if not args.json:
        print(completion.text, flush=True)
    completion.explain(images, args.question).save(args.out, optimize=True)
    if args.json:
        print(to_json({**dataclasses.asdict(completion), "picture": args.out}))
    else:
        say_cost(completion)
        print(args.out, file=sys.stderr)
