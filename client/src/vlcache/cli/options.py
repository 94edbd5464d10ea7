"""What every command that asks a question lets choose, and the settings that it means."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from vlcache._channel import DEFAULT_ADDRESS, stays_here
from vlcache._client import Client
from vlcache._settings import Compression, Sampling, Timeout, Tls, Wire

TOKEN_VARIABLE = "VLCACHE_TOKEN"  # noqa: S105 - where it is, not what


def add_service(parser: Any) -> None:
    """Where the service is, and how it is known."""
    parser.add_argument("--address", default=DEFAULT_ADDRESS, help="host:port (default: %(default)s)")
    group = parser.add_argument_group(
        "security", f"a token, where the service wants one, is read from {TOKEN_VARIABLE}"
    )
    group.add_argument("--ca-file", metavar="FILE", help="connect with TLS to a service that this CA vouches for")
    group.add_argument("--cert-file", metavar="FILE", help="the client's own certificate")
    group.add_argument("--key-file", metavar="FILE", help="its key")


def add_json(parser: Any) -> None:
    """Output for programs."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def client_of(args: argparse.Namespace, timeout: Timeout, **more: Any) -> Client:
    """The client that was asked for. Raises ValueError for a bad option, OSError for a file that cannot be read."""
    return Client(args.address, timeout=timeout, **identity_of(args), **more)


def identity_of(args: argparse.Namespace) -> dict[str, Any]:
    """How the service and the caller know each other: options of either client.

    Raises ValueError when the token would travel in plaintext: in the words of this command, before a client does.
    """
    token, tls = os.environ.get(TOKEN_VARIABLE) or None, _tls(args)
    if token is not None and tls is None and not stays_here(args.address):
        raise ValueError(f"{TOKEN_VARIABLE} is not sent in plaintext to {args.address}: connect with TLS (--ca-file)")
    return {"token": token, "tls": tls}


def _tls(args: argparse.Namespace) -> Tls | None:
    if args.ca_file is None and args.cert_file is None and args.key_file is None:
        return None
    return Tls(ca=args.ca_file, cert=args.cert_file, key=args.key_file)


def add_question(parser: Any) -> None:
    """The question, its images, who is asked, and all settings."""
    parser.add_argument("question")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="may be repeated")
    add_settings(parser)


def add_settings(parser: Any) -> None:
    """Who is asked, and all settings of a request."""
    add_service(parser)
    parser.add_argument("--model", default="", help="needed only when several are served")
    parser.add_argument(
        "--timeout", type=float, default=Timeout().total_s, metavar="SECONDS", help="for the whole answer"
    )
    parser.add_argument("--tenant", metavar="NAME", help="whose request this is (default: the service's)")
    parser.add_argument(
        "--priority", type=int, default=0, help="-100 to 100, less goes first where requests wait (default: 0)"
    )
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
        "--max-dropped-attention",
        type=float,
        metavar="WEIGHT",
        help="quality guard: keep more where the answer's first tokens give a dropped token more than this, in [0, 1]",
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
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")
    group.add_argument("--min-new-tokens", type=int, default=0, metavar="N", help="the answer does not end before")
    group.add_argument("--presence-penalty", type=float, default=0.0, metavar="P", help="in [-2, 2]")
    group.add_argument("--frequency-penalty", type=float, default=0.0, metavar="P", help="in [-2, 2]")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="P", help="in (0, 10]")
    group.add_argument(
        "--logit-bias",
        action="append",
        default=[],
        type=_token_bias,
        metavar="TOKEN=BIAS",
        help="added to the logit of a token by its id, in [-100, 100]; may be repeated",
    )
    group.add_argument(
        "--logprobs", type=int, metavar="N", help="log-probabilities of tokens and the N likeliest ones, with --json"
    )
    form = group.add_mutually_exclusive_group()
    form.add_argument(
        "--json-schema", type=_text_or_file, metavar="FILE|TEXT", help="the answer is JSON that this schema allows"
    )
    form.add_argument("--regex", help="the whole answer matches this regular expression")


def _token_bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKEN=BIAS") from None


def _text_or_file(text: str) -> str:
    """A schema as it is, or what the file of this name has."""
    if text.lstrip().startswith("{"):
        return text
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a JSON object nor a file that can be read") from error


def _parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The choices of how tokens are drawn. Raises ValueError for a bad one."""
    return Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        stop=tuple(args.stop),
        ignore_eos=args.ignore_eos,
        min_new_tokens=args.min_new_tokens,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        repetition_penalty=args.repetition_penalty,
        logit_bias=dict(args.logit_bias),
        logprobs=args.logprobs,
        json_schema=args.json_schema,
        regex=args.regex,
    )


def compression_of(args: argparse.Namespace) -> Compression:
    """The choices of what is kept. Raises ValueError for a bad one."""
    return Compression(
        policy=args.policy,
        retention=args.retention,
        max_kept_tokens=args.max_kept_tokens,
        budget_scope=args.budget_scope,
        min_retention=args.min_retention,
        max_dropped_attention=args.max_dropped_attention,
        parameters=dict(args.param),
        wire=_wire(args),
    )


def _wire(args: argparse.Namespace) -> Wire | None:
    wire = Wire(bits=args.wire_bits, key_channels=args.key_channels, group=args.wire_group, residual=args.wire_residual)
    return None if wire == Wire() else wire
