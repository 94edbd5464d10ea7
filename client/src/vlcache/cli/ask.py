"""`vlcache ask`: one question about images, the answer as it comes, then what it cost."""

import argparse
import json
import sys
from typing import Any

from vlcache._channel import DEFAULT_ADDRESS
from vlcache._client import Client
from vlcache._completion import Completion
from vlcache._events import Compressed, Delta
from vlcache._settings import Compression, Sampling, Timeout, Wire
from vlcache._stream import Stream
from vlcache.cli.formatting import format_bytes, format_ms, format_share, to_json


def add_command(commands: Any) -> None:
    """Adds the command and its options to the parser."""
    parser = commands.add_parser("ask", help="ask a question about images", description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("question")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="may be repeated")
    parser.add_argument("--address", default=DEFAULT_ADDRESS, help="host:port (default: %(default)s)")
    parser.add_argument("--model", default="", help="needed only when several are served")
    parser.add_argument(
        "--timeout", type=float, default=Timeout().total_s, metavar="SECONDS", help="for the whole answer"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    _add_compression(parser.add_argument_group("compression"))
    _add_wire(parser.add_argument_group("wire", "fewer bytes for what is kept, on its way to the decode worker only"))
    _add_sampling(parser.add_argument_group("sampling"))


def _add_compression(group: Any) -> None:
    group.add_argument("--policy", default="", help="compression policy")
    budget = group.add_mutually_exclusive_group()
    budget.add_argument("--retention", type=float, help="kept share of the prompt's KV, in (0, 1]")
    budget.add_argument("--max-kept-tokens", type=int, help="tokens kept per layer on average")
    group.add_argument(
        "--budget-scope",
        choices=("cache", "visual"),
        default="cache",
        help="what the budget is a share of: all KV, or that of the visual tokens, keeping all text",
    )
    group.add_argument(
        "--min-retention", type=float, metavar="SHARE", help="how far the budget may be lowered while memory is short"
    )
    group.add_argument(
        "--param", action="append", default=[], type=_parameter, metavar="NAME=VALUE", help="of the policy"
    )


def _add_wire(group: Any) -> None:
    group.add_argument("--wire-bits", type=int, default=0, help="8, 4 or 2 bits per value; 0 (default): as it is")
    group.add_argument("--key-channels", type=float, default=1.0, help="kept share of the K channels, in (0, 1]")
    group.add_argument("--wire-group", type=int, help="tokens (K) or channels (V) that share a scale, 8 to 256")
    group.add_argument("--wire-residual", type=int, help="last kept tokens that stay as they are")


def _add_sampling(group: Any) -> None:
    group.add_argument("--max-new-tokens", type=int)
    group.add_argument("--temperature", type=float, help="0 is greedy")
    group.add_argument("--top-p", type=float)
    group.add_argument("--top-k", type=int)
    group.add_argument("--seed", type=int)
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be repeated")


def _parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def run(args: argparse.Namespace) -> None:
    """Asks and prints. Raises VlcacheError, OSError for an unreadable image, ValueError for a bad option."""
    sampling, compression = _sampling(args), _compression(args)
    with (
        Client(args.address, timeout=Timeout(total_s=args.timeout)) as client,
        client.stream(
            args.question, images=args.image, model=args.model, sampling=sampling, compression=compression
        ) as stream,
    ):
        if not args.json:
            _print_text(stream)
        completion = stream.result()
    if args.json:
        print(to_json(completion))
    else:
        print(summary(completion), file=sys.stderr)


def _sampling(args: argparse.Namespace) -> Sampling:
    return Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        stop=tuple(args.stop),
    )


def _compression(args: argparse.Namespace) -> Compression:
    return Compression(
        policy=args.policy,
        retention=args.retention,
        max_kept_tokens=args.max_kept_tokens,
        budget_scope=args.budget_scope,
        min_retention=args.min_retention,
        parameters=dict(args.param),
        wire=_wire(args),
    )


def _wire(args: argparse.Namespace) -> Wire | None:
    wire = Wire(bits=args.wire_bits, key_channels=args.key_channels, group=args.wire_group, residual=args.wire_residual)
    return None if wire == Wire() else wire


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
            f"({format_share(kept.realised_retention, 1)} by {kept.policy}{_lowered(kept)})"
        )
    if (transfer := completion.transfer) is not None:
        parts.append(f"{format_bytes(transfer.sent_bytes)} sent via {transfer.transport}")
    return parts


def _lowered(kept: Compressed) -> str:
    if kept.requested_retention >= kept.asked_retention:
        return ""
    return f", {format_share(kept.asked_retention, 1)} asked"


def _latencies(completion: Completion) -> str:
    timings = completion.timings
    mean_itl_s = sum(timings.itl_s) / len(timings.itl_s) if timings.itl_s else None
    return f"TTFT {format_ms(timings.ttft_s)}, TTST {format_ms(timings.ttst_s)}, mean ITL {format_ms(mean_itl_s)}"
