"""`vlcache ask`: one question about images or videos, the answer as it comes, then what it cost."""

import argparse
import sys
from typing import Any

from vlcache._completion import Completion
from vlcache._events import Compressed, Delta, Guard
from vlcache._settings import Timeout
from vlcache._stream import Stream
from vlcache.cli.formatting import format_bytes, format_ms, format_share, to_json
from vlcache.cli.options import add_question, client_of, compression_of, sampling_of


def add_command(commands: Any) -> None:
    """Adds the command and its options to the parser."""
    parser = commands.add_parser("ask", help="ask a question about images or videos", description=__doc__)
    parser.set_defaults(run=run)
    add_question(parser)
    parser.add_argument("--video", action="append", default=[], metavar="FILE", help="may be repeated")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> None:
    """Asks and prints. Raises VlcacheError, OSError for an unreadable file, ValueError for a bad option."""
    sampling, compression = sampling_of(args), compression_of(args)
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
        print(summary(completion), file=sys.stderr)


def _print_text(stream: Stream) -> None:
    has_text = False
    try:
        for event in stream:
            if isinstance(event, Delta):
                has_text = has_text or bool(event.text)
                print(event.text, end="", flush=True)
    finally:
        # What follows, an error too, begins on its own line.
        if has_text:
            print(flush=True)


def summary(completion: Completion) -> str:
    """Tokens, KV bytes and latencies of an answer in one line."""
    usage = completion.usage
    prompt = f"prompt {usage.prompt_tokens} tokens ({usage.visual_tokens} visual + {usage.text_tokens} text)"
    parts = [prompt, f"answer {usage.generated_tokens} tokens", *_kv_parts(completion), _latencies(completion)]
    return " | ".join(parts)


def _kv_parts(completion: Completion) -> list[str]:
    parts = []
    if (kept := completion.compression) is not None:
        parts.append(
            f"KV {format_bytes(kept.full_bytes)} full, {format_bytes(kept.kept_bytes)} kept "
            f"({format_share(kept.realised_retention, 1)} by {kept.policy}{_changed(kept)})"
        )
    if (transfer := completion.transfer) is not None:
        parts.append(f"{format_bytes(transfer.sent_bytes)} sent via {transfer.transport}")
    return parts


def _changed(kept: Compressed) -> str:
    if kept.guard is Guard.REFUSED:
        return ", no room for what the guard wants"
    if kept.requested_retention == kept.asked_retention:
        return ""
    return f", {format_share(kept.asked_retention, 1)} asked"


def _latencies(completion: Completion) -> str:
    timings = completion.timings
    mean_itl_s = sum(timings.itl_s) / len(timings.itl_s) if timings.itl_s else None
    return f"TTFT {format_ms(timings.ttft_s)}, TTST {format_ms(timings.ttst_s)}, mean ITL {format_ms(mean_itl_s)}"
