"""`vlcache bench`: a load on a running service; flags and figures are those of `vllm bench serve`, and the KV saved."""

import argparse
import asyncio
import datetime
import json
import math
import platform
import re
import sys
from pathlib import Path
from typing import Any

from vlcache._async_client import AsyncClient
from vlcache._completion import Completion
from vlcache._errors import VlcacheError
from vlcache._progress import progress_bar
from vlcache._request import Request
from vlcache._settings import RetryPolicy, Timeout
from vlcache.bench.figures import METRICS, OBJECTIVES, result_of
from vlcache.bench.load import Arrivals, Run, run_load
from vlcache.bench.workload import Workload
from vlcache.cli.options import add_json, add_settings, compression_of, identity_of, sampling_of
from vlcache.cli.terminal import has_rich, views_for
from vlcache.formatting import format_bytes, format_share, format_table, to_json

_SIZE = re.compile(r"([1-9][0-9]*)x([1-9][0-9]*)")


def add_command(commands: Any) -> None:
    """Adds the command and its options to the parser."""
    parser = commands.add_parser("bench", help="measure a running service under load", description=__doc__)
    parser.set_defaults(run=run)
    _add_load(parser.add_argument_group("load"))
    _add_workload(parser.add_argument_group("workload"))
    add_settings(parser)
    add_json(parser)
    parser.add_argument("--save-result", metavar="FILE", help="write the result as JSON")


def _add_load(group: Any) -> None:
    group.add_argument("--num-prompts", type=int, default=100, metavar="N", help="(default: %(default)s)")
    group.add_argument(
        "--request-rate", type=float, default=math.inf, metavar="R", help="requests per second (default: all at once)"
    )
    group.add_argument(
        "--burstiness", type=float, default=1.0, metavar="B", help="1 (default) is Poisson, less is burstier"
    )
    group.add_argument("--max-concurrency", type=int, metavar="N", help="requests in flight at most")
    group.add_argument(
        "--warmup", type=int, default=1, metavar="N", help="requests before, not counted (default: %(default)s)"
    )
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        type=_objective,
        metavar="NAME:MS",
        help=f"objectives of {', '.join(OBJECTIVES)} that make a request a good one",
    )
    group.add_argument(
        "--metric-percentiles",
        type=_percentiles,
        default=(99.0,),
        metavar="P,P",
        help="in percent, with commas between (default: 99)",
    )


def _add_workload(group: Any) -> None:
    group.add_argument("--prompts", metavar="FILE", help="JSON lines of prompt, images and max_new_tokens")
    group.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="of every question; may be repeated"
    )
    group.add_argument(
        "--image-size", type=_size, default=(336, 336), metavar="WxH", help="of generated images (default: 336x336)"
    )
    group.add_argument(
        "--images-per-prompt", type=int, default=1, metavar="N", help="generated ones (default: %(default)s)"
    )
    group.add_argument(
        "--random-input-len", type=int, default=32, metavar="N", help="words of a question (default: %(default)s)"
    )
    group.add_argument(
        "--random-output-len",
        dest="max_new_tokens",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="the same as --max-new-tokens; answers are as long with --ignore-eos",
    )


def run(args: argparse.Namespace) -> None:
    """Measures and prints.

    Raises VlcacheError when nothing was answered, OSError for an unreadable file, ValueError for a bad option.
    """
    if args.num_prompts < 1 or args.warmup < 0 or (args.max_concurrency is not None and args.max_concurrency < 1):
        raise ValueError("--num-prompts and --max-concurrency must be at least 1, and --warmup not negative")
    base = Request(
        model=args.model, sampling=sampling_of(args), compression=compression_of(args), priority=args.priority
    )
    seed = args.seed or 0
    workload = Workload(
        input_words=args.random_input_len,
        images=tuple(args.image),
        image_size=args.image_size,
        num_images=args.images_per_prompt,
        prompts=args.prompts,
        base=base,
        seed=seed,
    )
    arrivals = Arrivals(rate=args.request_rate, burstiness=args.burstiness, seed=seed)
    done, model = asyncio.run(_measure(args, workload, arrivals))
    _report(args, {**_setting(args, model), **_result(args, done)})


async def _measure(args: argparse.Namespace, workload: Workload, arrivals: Arrivals) -> tuple[Run, str]:
    """The run, and the model that answered. Requests are made before the clock starts."""
    requests = workload.requests(args.warmup + args.num_prompts)
    # a second attempt would hide what a client without one sees
    options = {"timeout": Timeout(total_s=args.timeout), "retry": RetryPolicy(max_attempts=1), "tenant": args.tenant}
    async with AsyncClient(args.address, **options, **identity_of(args)) as client:
        for request in requests[: args.warmup]:
            await client.generate(**request.options())
        with progress_bar("requests", args.num_prompts, shown=has_rich()) as advance:
            measured = requests[args.warmup :]
            done = await run_load(client, measured, arrivals, max_concurrency=args.max_concurrency, advance=advance)
    return done, _model_of(done)


def _model_of(done: Run) -> str:
    """Raises the first error when nothing was answered: there is nothing to report."""
    answers = [outcome.answer for outcome in done.outcomes]
    models = [answer.model for answer in answers if isinstance(answer, Completion)]
    if not models:
        raise next(answer for answer in answers if isinstance(answer, VlcacheError))
    return models[0]


def _setting(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """What was measured, and from where."""
    return {
        "date": datetime.datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": "vlcache",
        "model_id": model,
        "address": args.address,
        "client": f"{platform.machine()}, Python {platform.python_version()}",
        "num_prompts": args.num_prompts,
        "request_rate": "inf" if math.isinf(args.request_rate) else args.request_rate,
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        "seed": args.seed or 0,
    }


def _result(args: argparse.Namespace, done: Run) -> dict[str, Any]:
    return result_of(done, percentiles=args.metric_percentiles, objectives=dict(args.goodput))


def _report(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if args.save_result:
        Path(args.save_result).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.json:
        print(to_json(result))
        return
    views = views_for(sys.stdout)
    for title, header, rows in _tables(result, args.metric_percentiles):
        if views is None:
            print(f"{title}\n{format_table(header, rows)}\n")
        else:
            views.show(views.figures_view(title, header, rows))


def _tables(result: dict[str, Any], percentiles: tuple[float, ...]) -> list[tuple[str, list[str], list[list[str]]]]:
    rows = [
        ["completed, failed", f"{result['completed']}, {result['failed']}"],
        ["seconds", f"{result['duration']:.2f}"],
        ["requests/s", f"{result['request_throughput']:.2f}"],
        ["generated tokens/s", f"{result['output_throughput']:.1f}"],
        ["all tokens/s", f"{result['total_token_throughput']:.1f}"],
        ["most requests at once", str(result["max_concurrent_requests"])],
        ["KV of the prompts", format_bytes(result["kv_full_bytes"])],
        ["KV kept", f"{format_bytes(result['kv_kept_bytes'])} ({format_share(result['kv_retention'], 1)})"],
        ["KV sent", format_bytes(result["kv_sent_bytes"])],
    ]
    if result["request_goodput"] is not None:
        rows.insert(3, ["good requests/s", f"{result['request_goodput']:.2f}"])
    rows += [[f"failed: {name}", str(count)] for name, count in result["errors"].items()]
    kinds = ["mean", "median", "std", *(f"p{percent:g}" for percent in percentiles)]
    times = [[name.upper(), *(f"{result[f'{kind}_{name}_ms']:.1f}" for kind in kinds)] for name in METRICS]
    return [(f"load on {result['address']}", ["", ""], rows), ("latencies, ms", ["", *kinds], times)]


def _size(text: str) -> tuple[int, int]:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT")
    return int(match[1]), int(match[2])


def _objective(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    if name not in OBJECTIVES:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:MS with a name of {', '.join(OBJECTIVES)}")
    return name, float(limit)


def _percentiles(text: str) -> tuple[float, ...]:
    percents = tuple(float(part) for part in text.split(","))
    if not all(0 <= percent <= 100 for percent in percents):
        raise argparse.ArgumentTypeError(f"percentiles are in [0, 100], not {text}")
    return percents
