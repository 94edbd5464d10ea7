"""What the wire stage costs and saves: a parcel of a 7B model's size encoded and restored, and one real prompt's bytes.

Random KV of `--kept` tokens per layer and KV head; encoding and restoring are the workers' own, beside one copy of the
same bytes in the same run, in CPU time. On a wire slower than `pays below` fewer bytes save more time than encoding and
restoring take. The prompt's rows are of the bundled model, body bytes as a transport gets them. What the decode worker
holds afterwards is the same throughout.

    python -m benchmarks.wire --json -
    python -m benchmarks.wire --bits 4 --key-channels 1 0.6 --residual 0 --json -
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import tyro
import vlcache

from benchmarks.local_pipeline import LocalPipeline, local_job
from benchmarks.report import table, write_json
from benchmarks.shapes import SHAPES, ShapeName
from benchmarks.stopwatch import WARM_UPS
from models.shapes_vlm.paths import CHECKPOINT
from models.shapes_vlm.questions import draw_samples
from prefill_worker.compression.policies.vl_cache import VLCache
from shared.kv.encoding import Encoding
from shared.kv.layout import KVLayout
from shared.model.kv_codec import decode, encode
from shared.request.params import Budget, Wire

MIB = 1 << 20
CODEC_HEADER = ("bits", "K channels", "encode CPU ms/MiB", "restore CPU ms/MiB", "wire / plain", "pays below MB/s")
PROMPT_HEADER = ("bits", "K channels", "retention", "plain bytes", "wire bytes", "wire / plain")


@dataclass(frozen=True, kw_only=True)
class WireConfig:
    """What to measure."""

    shape: ShapeName = "qwen2.5-vl-7b"
    """Whose KV is random, in bfloat16."""
    kept: int = 288
    """Tokens kept of each KV head; a tenth of 2,880."""
    bits: tuple[int, ...] = (8, 4, 2, 0)
    """Bits per value."""
    key_channels: tuple[float, ...] = (1.0, 0.6)
    """Kept shares of the K channels."""
    group: int = 32
    """Values that share a scale."""
    residual: int = 32
    """Last tokens that stay as they are."""
    retentions: tuple[float, ...] = (1.0, 0.1)
    """Kept shares of the bundled model's prompt."""
    seed: int = 0
    """Of KV, question and scenes."""
    rounds: int = 20
    """Measured times each."""
    threads: int = 1
    """torch threads."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE|-")] = None
    """Where to write the figures; `-` prints them as the last line."""

    def wires(self) -> Iterator[Wire]:
        """All combinations that are not plain."""
        for bits, channels in itertools.product(self.bits, self.key_channels):
            wire = Wire(bits=bits, key_channels=channels, group=self.group, residual=self.residual)
            if not wire.plain:
                yield wire

    @property
    def layout(self) -> KVLayout:
        """Of the random parcel."""
        shape = SHAPES[self.shape]
        return KVLayout(num_layers=shape.layers, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim, dtype="bfloat16")


class RandomParcel:
    """KV that is encoded and restored over and over."""

    def __init__(self, config: WireConfig) -> None:
        self._layout = config.layout
        self._num_kept = (config.kept,) * config.layout.num_layers * config.layout.num_kv_heads
        self._rows = torch.randn(2 * sum(self._num_kept), config.layout.head_dim).bfloat16()
        self._restored = torch.empty_like(self._rows)

    @property
    def plain_bytes(self) -> int:
        """Bytes without an encoding."""
        return self._layout.body_bytes(self._num_kept)

    def copy(self) -> object:
        """What moving the same bytes once takes."""
        return self._restored.copy_(self._rows)

    def steps(self, wire: Wire) -> tuple[int, Callable[[], object], Callable[[], object]]:
        """Bytes on the wire, encoding, and restoring what was encoded last."""
        encoding = Encoding.asked_for(wire, self._layout, self._num_kept)
        if encoding is None:
            raise ValueError(f"{wire} saves nothing on {self._num_kept[0]} tokens per head")
        body = torch.empty(encoding.body_bytes(self._layout, self._num_kept), dtype=torch.uint8)
        channels = self._channels(encoding)
        where = (self._layout, self._num_kept, encoding)
        return (
            len(body),
            partial(encode, self._rows, *where, channels, body),
            partial(decode, body, *where, self._restored),
        )

    def _channels(self, encoding: Encoding) -> torch.Tensor | None:
        layout = self._layout
        if encoding.key_channels == layout.head_dim:
            return None
        order = torch.rand(layout.num_layers, layout.num_kv_heads, layout.head_dim).argsort(dim=2)
        return order < encoding.key_channels


def measure_codec(config: WireConfig) -> dict[str, Any]:
    """Medians of CPU time per MiB of the plain parcel."""
    parcel, wires = RandomParcel(config), list(config.wires())
    made = {wire: parcel.steps(wire) for wire in wires}
    steps: dict[str, Callable[[], object]] = {"copy": parcel.copy}
    for number, (_, write, read) in enumerate(made.values()):
        steps |= {f"encode {number}": write, f"restore {number}": read}
    times = _cpu_ms(steps, config.rounds)
    per_mib = {name: statistics.median(values) * MIB / parcel.plain_bytes for name, values in times.items()}
    rows = []
    for number, wire in enumerate(wires):
        write_ms, read_ms = per_mib[f"encode {number}"], per_mib[f"restore {number}"]
        share = made[wire][0] / parcel.plain_bytes
        rows.append(
            {
                "bits": wire.bits,
                "key_channels": wire.key_channels,
                "encode_ms_per_mib": write_ms,
                "restore_ms_per_mib": read_ms,
                "wire_share": share,
                "pays_below_mb_per_s": (1 - share) * MIB / (write_ms + read_ms) / 1000,
            }
        )
    return {"plain_bytes": parcel.plain_bytes, "copy_ms_per_mib": per_mib["copy"], "codec": rows}


def _cpu_ms(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU time, which a busy machine distorts least; in each round every step runs once."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(WARM_UPS + rounds):
        for name, step in steps.items():
            started = time.process_time()
            step()
            times[name].append((time.process_time() - started) * 1000)
    return {name: values[WARM_UPS:] for name, values in times.items()}


def measure_prompt(config: WireConfig) -> list[dict[str, Any]]:
    """Body bytes of one question's parcel with the bundled model."""
    pipeline = LocalPipeline(str(CHECKPOINT), dtype="bfloat16", threads=config.threads, kv_memory_mib=1, max_num_seqs=1)
    (sample,) = draw_samples(seed=config.seed, count=1)
    message = vlcache.Message(role="user", parts=[*map(vlcache.Image, sample.images), sample.question])
    prompt = pipeline.build([message.to_proto()], max_new_tokens=2)
    rows = []
    for retention, wire in itertools.product(config.retentions, config.wires()):
        job = local_job(VLCache(), Budget(retention=retention), max_new_tokens=2)
        job = dataclasses.replace(job, wire=wire)
        parcel = pipeline.compress(prompt, pipeline.prefill(prompt, [job]), job)
        rows.append(
            {
                "bits": wire.bits,
                "key_channels": wire.key_channels,
                "retention": retention,
                "plain_bytes": parcel.compression.kept_bytes,
                "wire_bytes": parcel.manifest.body_bytes,
            }
        )
    return rows


def measure(config: WireConfig) -> dict[str, Any]:
    """Both halves."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    settings = dataclasses.asdict(config)
    del settings["json"]
    return {"workload": settings, **measure_codec(config), "prompt": measure_prompt(config)}


def _report(figures: dict[str, Any]) -> str:
    codec = [
        [
            str(row["bits"] or "as they are"),
            f"{row['key_channels']:.0%}",
            f"{row['encode_ms_per_mib']:.2f}",
            f"{row['restore_ms_per_mib']:.2f}",
            f"{row['wire_share']:.3f}",
            f"{row['pays_below_mb_per_s']:.0f}",
        ]
        for row in figures["codec"]
    ]
    prompt = [
        [
            str(row["bits"] or "as they are"),
            f"{row['key_channels']:.0%}",
            f"{row['retention']:g}",
            str(row["plain_bytes"]),
            str(row["wire_bytes"]),
            f"{row['wire_bytes'] / row['plain_bytes']:.3f}",
        ]
        for row in figures["prompt"]
    ]
    size = f"{figures['plain_bytes'] / MIB:.1f} MiB plain, one copy {figures['copy_ms_per_mib']:.2f} CPU ms/MiB"
    return f"{size}\n\n{table(CODEC_HEADER, codec)}\n\n{table(PROMPT_HEADER, prompt)}"


def main() -> None:
    """Measures, prints two tables, writes JSON."""
    config = tyro.cli(WireConfig, description=__doc__)
    figures = measure(config)
    sys.stdout.write(_report(figures) + "\n")
    write_json(config.json, {"benchmark": "wire", **figures})


if __name__ == "__main__":
    main()
