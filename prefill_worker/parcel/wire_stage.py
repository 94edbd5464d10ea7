"""The last stage of a prompt: what is kept is written plain or, where the request asks for it, as fewer bytes.

Fewer bytes travel; the decode worker restores their plain form, so its memory is what it is without this stage. All
transports carry what was written here, that within one process included: an answer depends on no placement.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from prefill_worker.compression.key_channels import sent_channels
from prefill_worker.compression.pipeline import Selection
from prefill_worker.engine.engine import Prefilled
from prefill_worker.parcel.host_rows import Arrival, write_where_kv_lies
from prefill_worker.parcel.writer import gather_kept, write_body
from shared.kv.encoding import Encoding
from shared.kv.layout import KVLayout
from shared.model.kv_codec import MAX_MAGNITUDE, encode, fits
from shared.request.params import Wire

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WrittenBody:
    """A parcel body, complete once `arrival` has returned. Without an `encoding` it is plain."""

    body: memoryview
    encoding: Encoding | None
    arrival: Arrival


def write_kept(
    prefilled: Prefilled,
    selections: Sequence[Selection],
    num_kept: Sequence[int],
    layout: KVLayout,
    wire: Wire,
    room: memoryview,
) -> WrittenBody:
    """Writes what was selected to the beginning of `room`, which holds it plain and must stay until it has arrived.

    Plain is also what would not become smaller, and what holds a value that fp16 scales cannot serve.

    Args:
        prefilled: A pass that measured `wire_statistics(wire)`.
        num_kept: As `kept_counts`.
    """
    encoding = Encoding.asked_for(wire, layout, num_kept)
    if encoding is not None:
        shape = (2 * sum(num_kept), layout.head_dim)
        rows = torch.empty(shape, dtype=prefilled.keys[0].dtype, device=prefilled.keys[0].device)
        gather_kept(prefilled, selections, num_kept, layout, rows)
        if fits(rows):
            return _encoded(prefilled, rows, num_kept, layout, encoding, room)
        log.warning("a parcel travels plain: it holds a value that is not finite or beyond %d", MAX_MAGNITUDE)
    body = room[: layout.body_bytes(num_kept)]
    arrival = write_body(prefilled, selections, num_kept, layout, body)
    return WrittenBody(body=body, encoding=None, arrival=arrival)


@torch.inference_mode()
def _encoded(
    prefilled: Prefilled,
    rows: torch.Tensor,
    num_kept: Sequence[int],
    layout: KVLayout,
    encoding: Encoding,
    room: memoryview,
) -> WrittenBody:
    channels = None
    if encoding.key_channels < layout.head_dim:
        channels = sent_channels(prefilled, rows, layout, num_kept, encoding.key_channels)
    body = room[: encoding.body_bytes(layout, num_kept)]
    target = torch.frombuffer(body, dtype=torch.uint8)
    write = partial(encode, rows, layout, num_kept, encoding, channels)
    return WrittenBody(body=body, encoding=encoding, arrival=write_where_kv_lies(write, target, rows.device))
