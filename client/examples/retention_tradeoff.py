# %% [markdown]
# What keeping less of the KV costs, and what it saves: sample questions at several retentions, and a picture of the
# answers that stay right, the KV that is kept, and the time per token.
#
#     python retention_tradeoff.py models/shapes_vlm/samples --address 127.0.0.1:50051 --out tradeoff.svg
#
# The folder holds images and `samples.json`, a list of `{"images": [FILE], "question": ..., "answer": ...}`. Editors
# that know percent cells run it cell by cell, and show the picture below the last one.

# %%
import argparse
import html
import itertools
import json
import statistics
from pathlib import Path
from typing import NamedTuple

from vlcache import DEFAULT_ADDRESS, Client, Completion, Compression, Request, Sampling

parser = argparse.ArgumentParser()
parser.add_argument("folder", nargs="?", default="models/shapes_vlm/samples", type=Path)
parser.add_argument("--address", default=DEFAULT_ADDRESS)
parser.add_argument("--retentions", nargs="+", type=float, default=[1.0, 0.5, 0.2, 0.1, 0.05, 0.02])
parser.add_argument("--policy", default="", help="compression policy (default: the service's)")
parser.add_argument("--samples", type=int, help="only so many of the questions")
parser.add_argument("--out", default="tradeoff.svg", type=Path)
options, _ = parser.parse_known_args()  # a notebook's kernel has arguments of its own

samples = json.loads((options.folder / "samples.json").read_text())[: options.samples]
print(f"{len(samples)} questions at {len(options.retentions)} retentions")


# %%
# One retention after the other, one question after the other: times are those of an idle service.
def request(sample: dict, retention: float) -> Request:
    return Request(
        sample["question"],
        images=[options.folder / name for name in sample["images"]],
        sampling=Sampling(max_new_tokens=64, temperature=0.0),
        compression=Compression(policy=options.policy, retention=retention),
    )


with Client(options.address) as client:
    answers = {
        retention: client.generate_many([request(sample, retention) for sample in samples], concurrency=1)
        for retention in options.retentions
    }


# %%
class Row(NamedTuple):
    """What a retention gave: share of right answers, share of the KV kept, median milliseconds per token."""

    retention: float
    right: float
    kept: float
    token_ms: float


def is_right(answer: Completion, sample: dict) -> bool:
    """The whole answer, word for word."""
    return answer.text.strip() == sample["answer"].strip()


def row(retention: float, many: list[Completion]) -> Row:
    right = [is_right(answer, sample) for answer, sample in zip(many, samples, strict=True)]
    known = [answer.compression for answer in many if answer.compression]
    gaps_s = list(itertools.chain.from_iterable(answer.timings.itl_s for answer in many))
    return Row(
        retention=retention,
        right=statistics.fmean(right),
        kept=sum(each.kept_bytes for each in known) / max(1, sum(each.full_bytes for each in known)),
        token_ms=1000 * statistics.median(gaps_s) if gaps_s else 0.0,
    )


rows = [row(retention, many) for retention, many in answers.items()]
print("retention   right    kept   ms/token")
for each in rows:
    print(f"{each.retention:>9.0%} {each.right:>7.0%} {each.kept:>7.1%} {each.token_ms:>10.1f}")

# %%
WIDTH, HEIGHT, LEFT, TOP, GAP = 300, 190, 52, 80, 36
BLUE, GREY, INK = "#2563eb", "#d1d5db", "#374151"


class Svg(str):
    """An SVG that a notebook shows."""

    def _repr_svg_(self) -> str:
        return str(self)


def text(x: float, y: float, words: str, anchor: str = "middle", size: int = 12) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" font-size="{size}">{html.escape(words)}</text>'


def panel(number: int, title: str, values: list[float], most: float, unit: str) -> str:
    """A bar for each retention, in the order in which they were asked for."""
    x0, step = LEFT + number * (WIDTH + LEFT + GAP), WIDTH / len(values)
    parts = [text(x0, TOP - 22, title, "start", 14)]
    for share in (0, 0.5, 1):
        y = TOP + HEIGHT * (1 - share)
        parts.append(f'<line x1="{x0}" x2="{x0 + WIDTH}" y1="{y:.0f}" y2="{y:.0f}" stroke="{GREY}"/>')
        parts.append(text(x0 - 6, y + 4, f"{most * share:.3g}{unit}", "end", 11))
    for at, (value, each) in enumerate(zip(values, rows, strict=True)):
        x, high = x0 + step * (at + 0.5), HEIGHT * value / most
        bar = f'x="{x - 0.3 * step:.1f}" y="{TOP + HEIGHT - high:.1f}" width="{0.6 * step:.1f}" height="{high:.1f}"'
        parts.append(f'<rect {bar} fill="{BLUE}"/>')
        parts.append(text(x, TOP + HEIGHT - high - 5, f"{value:.0f}" if value >= 10 else f"{value:.1f}", size=11))
        parts.append(text(x, TOP + HEIGHT + 18, f"{each.retention:g}", size=11))
    parts.append(text(x0 + WIDTH / 2, TOP + HEIGHT + 38, "retention"))
    return "".join(parts)


def draw() -> Svg:
    slowest = max(each.token_ms for each in rows)
    panels = (
        ("right answers", [100 * each.right for each in rows], 100.0, " %"),
        ("KV kept", [100 * each.kept for each in rows], 100.0, " %"),
        ("time per token", [each.token_ms for each in rows], 1.2 * slowest or 1.0, " ms"),
    )
    width, height = len(panels) * (WIDTH + LEFT + GAP), TOP + HEIGHT + 56
    drawn = "".join(panel(number, *each) for number, each in enumerate(panels))
    return Svg(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'font-family="sans-serif" fill="{INK}"><rect width="100%" height="100%" fill="white"/>'
        f"{text(LEFT, 22, f'{len(samples)} questions at several retentions', 'start', 16)}{drawn}</svg>"
    )


picture = draw()
options.out.write_text(picture)
print(options.out)

# %%
picture  # noqa: B018 - a notebook shows it
