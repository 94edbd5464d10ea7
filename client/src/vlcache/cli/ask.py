"""`vlcache ask`: one question about images or videos, the answer as it comes, then what it cost."""

import argparse
from dataclasses import replace
from typing import Any

from vlcache._events import Delta
from vlcache._settings import Timeout
from vlcache._stream import Stream
from vlcache.cli.options import add_json, add_question, client_of, compression_of, sampling_of
from vlcache.cli.terminal import say_cost
from vlcache.formatting import to_json


def add_command(commands: Any) -> None:
    """Adds the command and its options to the parser."""
    parser = commands.add_parser("ask", help="ask a question about images or videos", description=__doc__)
    parser.set_defaults(run=run)
    add_question(parser)
    parser.add_argument("--video", action="append", default=[], metavar="FILE", help="may be repeated")
    parser.add_argument("--n", type=int, default=1, help="answers to draw, at most 16 (1)")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Asks and prints. Raises VlcacheError, OSError for an unreadable file, ValueError for a bad option."""
    sampling, compression = replace(sampling_of(args), n=args.n), compression_of(args)
    with (
        client_of(args, Timeout(total_s=args.timeout), tenant=args.tenant) as client,
        client.stream(
            args.question,
            images=args.image,
            videos=args.video,
            model=args.model,
            sampling=sampling,
            compression=compression,
            priority=args.priority,
        ) as stream,
    ):
        if not args.json:
            _print_text(stream)
        completion = stream.result()
    if args.json:
        print(to_json(completion))
    else:
        for number, choice in enumerate(completion.choices[1:], start=2):
            print(f"[{number}] {choice.text}")
        say_cost(completion)


def _print_text(stream: Stream) -> None:
    has_text = False
    try:
        for event in stream:
            # the others would come in between: they follow
            if isinstance(event, Delta) and event.choice == 0:
                has_text = has_text or bool(event.text)
                print(event.text, end="", flush=True)
    finally:
        # What follows, an error too, begins on its own line.
        if has_text:
            print(flush=True)
