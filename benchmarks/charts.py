"""One picture per benchmark: the telling figures of its JSON beside their peer or physical limit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vlcache.formatting import format_bytes

from benchmarks.overload.chart import overload_chart
from benchmarks.placement.chart import placement_chart
from benchmarks.plot import MOST_SERIES, Panel, bar_chart
from benchmarks.quality.guard import guard_chart
from benchmarks.quality.heat_map import quality_map
from benchmarks.quality.overview import contenders_in
from benchmarks.second_question.chart import second_question_chart

Figures = Mapping[str, Any]

PEER, FULL, KEPT = "peer or limit", "retention 1", "retention 0.1"
MEMORY, GRPC = "shared memory", "gRPC"
# Of benchmarks.transfer: what a label compares, its method by series.
DELIVERIES = {
    "memcpy": {PEER: "memcpy"},
    "plain socket": {PEER: "tcp"},
    "bare grpcio stream": {PEER: "bare_grpc"},
    "handed over": {MEMORY: "memory_in_place", GRPC: "grpc"},
    "copied, handed over": {MEMORY: "memory"},
    "installed": {MEMORY: "memory_installed", GRPC: "grpc_installed"},
}


def capacity(runs: Sequence[Figures]) -> str:
    """Sequences and tokens/s at either retention, and what a step that only reads memory would give."""
    found = _only(runs)
    workload, both = found["workload"], ((FULL, "1.0"), (KEPT, "0.1"))
    sequences = {
        label: {name: found[f"sequences{suffix}_{retention}"] for name, retention in both}
        for label, suffix in (("filled once", ""), ("after churn", "_after_churn"))
    }
    speed = {name: found[f"tokens_per_s_{retention}"] for name, retention in both}
    ratio, roofline = found["throughput_ratio"], found["roofline_throughput_ratio"]
    return bar_chart(
        title=f"Sequences in {workload['kv_memory_mib']:,} MiB of KV, and tokens/s of the full pool",
        notes=[
            f"{_prompts(workload)}, {workload['new_tokens']} new ones; {_model(workload)}, {_heads(workload)}",
            _machine(found),
        ],
        series=[PEER, FULL, KEPT],
        panels=[
            Panel(title="sequences, each with room for all its tokens", groups=sequences, digits=0),
            Panel(title="tokens/s", groups={"filled once": speed}, digits=0),
            _against_roofline("tokens/s, retention 0.1 over 1, times", ratio, roofline),
        ],
    )


def cascade(runs: Sequence[Figures]) -> str:
    """The peak beside its expectation, and what it takes; runs of one machine differ in their model."""
    expected, measured = "retention + 1/L", "cascade"

    def panel(title: str, keys: Mapping[str, str]) -> Panel:
        groups = {}
        for run in runs:
            model = f"{run['workload']['layers']} x {run['workload']['hidden']:,}"
            for name, found in run["cascades"].items():
                groups[f"{model}, kept {name}"] = {label: 100 * found[key] for label, key in keys.items()}
        return Panel(title=title, groups=groups)

    workload = runs[0]["workload"]
    sizes = f"layers x hidden size, random weights, {workload['dtype']}"
    return bar_chart(
        title=f"What a prefill holds at once when it cascades ({workload['policy']})",
        notes=[f"{_prompts(workload)}; {sizes}", _machine(runs[0])],
        series=[expected, measured],
        panels=[
            panel("peak KV, % of the prompt's", {expected: "expected_ratio", measured: "peak_ratio"}),
            panel("time of the cascade over the rest of its pass, median %", {measured: "stage_share"}),
        ],
    )


def early_shipping(runs: Sequence[Figures]) -> str:
    """How long a first token waits for its parcel's commit; runs of one machine differ in how much a layer looks at."""
    whole, early = "whole, after the pass", "early"
    variants, waits = {"cascade": whole, "early": early}, dict[str, dict[str, float]]()
    for run in runs:
        for found in run["deliveries"]:
            link = f"{found['mbit']} Mbit" if found["mbit"] else "loopback"
            group = waits.setdefault(f"{found['policy']} {run['density']:.2f}, {link}", {})
            if found["variant"] in variants:
                group[variants[found["variant"]]] = found["hand_over_ms"]
    workload = runs[0]["workload"]
    return bar_chart(
        title="What is left to send when a pass is over",
        notes=[
            f"{_prompts(workload)}, kept {workload['retention']:g}; {_model(workload)}",
            "policy, density (share of the attention that counts for vl_cache), Mbit/s of the link",
            _machine(runs[0]),
        ],
        series=[whole, early],
        panels=[Panel(title="from the first token to the commit, median ms", groups=waits, digits=0)],
    )


def decode_step(runs: Sequence[Figures]) -> str:
    """A step at either retention beside transformers' caches and a step without any KV."""
    found = _only(runs)
    workload = found["workload"]
    steps = {
        "HF DynamicCache": {PEER: found["hf_dynamic_ms"]},
        "HF StaticCache": {PEER: found["hf_static_ms"]},
        "vlcache": {FULL: found["ours_full_ms"], KEPT: found["ours_kept_ms"]},
        "vlcache without any KV": {PEER: found["no_kv_ms"]},
    }
    return bar_chart(
        title=f"One decode step, batch of {workload['batch']}",
        notes=[
            f"{_prompts(workload)} per sequence; {_model(workload)}, {_heads(workload)}",
            f"{_machine(found)}; HF is {_transformers(found)}",
        ],
        series=[PEER, FULL, KEPT],
        panels=[
            Panel(title="median step, ms", groups=steps),
            _against_roofline("step at retention 1 over 0.1, times", found["ratio"], found["roofline_ratio"]),
        ],
    )


def end_to_end(runs: Sequence[Figures]) -> str:
    """A batch from prompts to last tokens, and where our time goes."""
    found = _only(runs)
    workload = found["workload"]
    ours = f"retention {workload['retention']:g}"
    whole = {"transformers": {PEER: found["hf_s"]}, "vlcache": {ours: found["ours_s"]}}
    stages = {name: {ours: seconds} for name, seconds in found["ours_stages_s"].items()}
    return bar_chart(
        title=f"A batch of {workload['batch']} from its prompts to its last tokens",
        notes=[
            f"{_prompts(workload)}, {workload['new_tokens']} new ones; {_model(workload)}, {_heads(workload)}",
            f"{_machine(found)}; {_transformers(found)}",
        ],
        series=[PEER, ours],
        panels=[
            Panel(title="median of the whole, s", groups=whole, digits=2),
            Panel(title="of which vlcache's stages, s", groups=stages, digits=2),
        ],
    )


def kernels(runs: Sequence[Figures]) -> str:
    """Every kernel that only moves KV beside a copy on the same device; the others by time."""
    found = _only(runs)
    workload, questions = found["workload"], found["questions"]
    shares: dict[str, dict[str, float]] = defaultdict(dict)
    times: dict[str, dict[str, float]] = defaultdict(dict)
    for question, contenders in questions.items():
        for contender, each in contenders.items():
            if "of_copy" in each:
                shares[question][contender] = 100 * each["of_copy"]
            else:
                times[question][contender] = each["p50_ms"]
    return bar_chart(
        title="Kernels beside a device copy in the same run",
        notes=[
            f"batch of {workload['batch']}, {_prompts(workload)}, {_heads(workload)}, {workload['dtype']}",
            _machine(found),
        ],
        series=_distinct(contender for contenders in questions.values() for contender in contenders),
        panels=[
            Panel(title="bytes per second, % of the copy's", groups=shares, digits=0),
            Panel(title="not bound by memory, median ms", groups=times, digits=3),
        ],
    )


def placement(runs: Sequence[Figures]) -> str:
    """What requests wait under each policy, by the number of routers that share the workers."""
    found = _only(runs)
    workload = found["workload"]
    fleet = f"{workload['workers']} unequal workers of each role, {workload['requests']:,} requests"
    return placement_chart(found["results"], [f"{fleet}, load {workload['load']:g}", _machine(found)])


def prefill_overhead(runs: Sequence[Figures]) -> str:
    """What each stage takes of a pass, and whole passes; runs of one machine differ in their KV heads."""
    workload = runs[0]["workload"]
    panels = [
        Panel(
            title="the stage alone, CPU time over the rest of its pass, median %",
            groups=_medians(runs, "stage_shares", factor=100),
            digits=2,
        ),
        Panel(
            title="whole passes with the stages up to this one, median ms",
            groups=_medians(runs, "percentiles_ms"),
            digits=0,
        ),
    ]
    return bar_chart(
        title=f"What compression to {100 * workload['retention']:g} % adds to a prefill",
        notes=[f"{_prompts(workload)}, {workload['rows']} observed rows; {_model(workload)}", _machine(runs[0])],
        series=_distinct(variant for run in runs for variant in run["percentiles_ms"]),
        # a GPU's stages have no times of their own
        panels=[panel for panel in panels if panel.groups],
    )


def _medians(runs: Sequence[Figures], key: str, *, factor: float = 1.0) -> dict[str, dict[str, float]]:
    """By KV heads, of the runs that have such figures."""
    return {
        _heads(run["workload"]): {name: factor * found["p50"] for name, found in run[key].items()}
        for run in runs
        if key in run
    }


def overload(runs: Sequence[Figures]) -> str:
    """Memory over the time of the overload, a line per process."""
    found = _only(runs)
    *_, at_capacity, beyond = found["results"]
    ratio = beyond["request_goodput"] / at_capacity["request_goodput"]
    goodput = f"{beyond['request_goodput']:.2f} requests/s answered in time, {ratio:.2f} of those at 100 %"
    return overload_chart(
        found, [f"{goodput}; {beyond['failed']} refused, each with a time to come back", _machine(found)]
    )


def quality(runs: Sequence[Figures]) -> str:
    """Right answers: by the guard's limit where there is one, bars by task under one policy at few retentions, else
    policies by retention and by task."""
    guarded = [row for run in runs for row in run["results"]]
    if any(row.get("max_dropped_attention", 1) < 1 for row in guarded):
        return guard_chart(guarded, _asked(runs[0]))
    found = _only(runs)
    rows = found["results"]
    policies = contenders_in(rows)
    retentions = sorted({row["retention"] for row in rows}, reverse=True)
    if len(policies) > 1 or len(retentions) > MOST_SERIES:
        return quality_map(rows, _asked(found))
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        groups[row["task"]][f"retention {row['retention']:g}"] = 100 * row["exact_match"]
    return bar_chart(
        title=f"Answers that stay right under compression: {policies[0]}",
        notes=_asked(found),
        series=_distinct(name for values in groups.values() for name in values),
        panels=[Panel(title="exact match by task, %", groups=groups)],
    )


def second_question(runs: Sequence[Figures]) -> str:
    """A second question's answers by who the images were kept for, and what it costs to keep them all."""
    found = _only(runs)
    workload = found["workload"]
    notes = [f"{workload['pairs']} pairs of questions to {workload['model']}", _machine(found)]
    return second_question_chart(found["results"], found["costs"], notes)


def serve(runs: Sequence[Figures]) -> str:
    """Throughput, goodput and TTFT by load, a bar per retention."""
    found = _only(runs)
    workload, rows = found["workload"], found["results"]

    def panel(title: str, key: str, digits: int) -> Panel:
        groups: dict[str, dict[str, float | None]] = defaultdict(dict)
        for row in rows:
            groups[row["load"]][f"retention {row['retention']:g}"] = row[key]
        return Panel(title=title, groups=groups, digits=digits)

    objectives = ", ".join(each.replace(":", " ") + " ms" for each in workload["goodput"]) or "no objective"
    return bar_chart(
        title=f"Serving within {format_bytes(found['kv_memory_bytes'])} of KV",
        notes=[
            f"{workload['num_prompts']} requests per load, {workload['max_new_tokens']} tokens per answer",
            _machine(found),
        ],
        series=_distinct(f"retention {row['retention']:g}" for row in rows),
        panels=[
            panel(f"goodput within {objectives}: requests/s", "request_goodput", 2),
            panel("throughput, requests/s", "request_throughput", 2),
            panel("median TTFT, ms", "median_ttft_ms", 0),
        ],
    )


def transfer(runs: Sequence[Figures]) -> str:
    """A parcel's ways beside memcpy, a socket and a bare stream, and how late tokens are meanwhile."""
    found = _only(runs)
    size, late = found["judged_size"], found["token_lateness_ms"]
    methods = found["sizes"][size]["methods"]
    times = {
        label: {name: methods[method]["wall_ms"]["p50"] for name, method in compared.items()}
        for label, compared in DELIVERIES.items()
    }
    lateness = {
        "idle": {PEER: late["idle"]["p99"]},
        "while parcels arrive": {MEMORY: late["memory"]["p99"], GRPC: late["grpc"]["p99"]},
    }
    return bar_chart(
        title=f"A parcel of {size} from one process to another",
        notes=[f"{found['workload']['rounds']} rounds, every way in each", _machine(found)],
        series=[PEER, MEMORY, GRPC],
        panels=[
            Panel(title="median ms (installed: copied into the KV pool, digest verified)", groups=times),
            Panel(title="lateness of other requests' tokens, p99, ms", groups=lateness),
        ],
    )


CHARTS: Mapping[str, Callable[[Sequence[Figures]], str]] = {
    chart.__name__: chart
    for chart in (
        capacity,
        cascade,
        decode_step,
        early_shipping,
        end_to_end,
        kernels,
        overload,
        placement,
        prefill_overhead,
        quality,
        second_question,
        serve,
        transfer,
    )
}


def _only(runs: Sequence[Figures]) -> Figures:
    if len(runs) != 1:
        raise ValueError(f"{runs[0]['benchmark']} has a picture of one run, not of {len(runs)}")
    return runs[0]


def _asked(found: Figures) -> list[str]:
    workload = found["workload"]
    return [f"{workload['samples']} fresh questions to {workload['model']}", _machine(found)]


def _against_roofline(title: str, measured: float, roofline: float) -> Panel:
    groups = {"measured": {KEPT: measured}, "roofline": {PEER: roofline}}
    return Panel(title=f"{title} (roofline: a step only reads weights and KV)", groups=groups, digits=2)


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _prompts(workload: Figures) -> str:
    return f"{workload['prompt']:,} prompt tokens"


def _model(workload: Figures) -> str:
    sizes = f"{workload['layers']} layers of {workload['hidden']:,}"
    return f"{workload['shape'] or sizes}, random weights, {workload['dtype']}"


def _heads(workload: Figures) -> str:
    return f"{workload['kv_heads']} KV heads"


def _machine(found: Figures) -> str:
    """The GPU, or the CPU where there is none, and the commit."""
    where, device = found["environment"], found.get("device", "cpu")
    cpu = f"{where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB"
    return f"{cpu if device == 'cpu' else device}; commit {where['commit']}"


def _transformers(found: Figures) -> str:
    return f"transformers {found['environment']['versions']['transformers']}, {found['hf_attention']}"
