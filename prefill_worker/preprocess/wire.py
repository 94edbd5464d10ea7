"""What a worker and its preprocessing processes say to each other: frames of a JSON header and raw bytes.

worker to process    the messages of a request, protobuf
process to worker    first an empty frame when it is ready; then, per request, arrays, little-endian, or an error
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from vlcache.v1 import inference_pb2 as pb

from prefill_worker.preprocess.image_grid import ImageGrid
from prefill_worker.preprocess.processed import Array, ProcessedPrompt
from shared.errors import ContextTooLongError, InternalError, InvalidRequestError, ServiceError

# Bytes of the header, bytes of the body.
PREFIX = struct.Struct("<IQ")
# Far above what a request takes and what is made of its images.
MAX_HEADER_BYTES = 16 << 20
MAX_BODY_BYTES = 1 << 30
DTYPES = ("int32", "int64", "float16", "float32", "float64", "uint8", "bool")
ERRORS = {kind.__name__: kind for kind in (InvalidRequestError, ContextTooLongError, InternalError)}


class FrameError(Exception):
    """What was received is no frame, or not the one that was due."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One message; `parts` follow each other in its body."""

    header: Mapping[str, Any]
    parts: Sequence[bytes | memoryview] = ()

    def pieces(self) -> list[bytes | memoryview]:
        """The bytes to send, in their order."""
        header = json.dumps(self.header).encode()
        body_bytes = sum(memoryview(part).nbytes for part in self.parts)
        return [PREFIX.pack(len(header), body_bytes), header, *self.parts]


READY = Frame(header={})


def sizes(prefix: bytes | memoryview) -> tuple[int, int]:
    """Bytes of header and body, by a frame's prefix.

    Raises:
        FrameError: They are beyond every limit.
    """
    header, body = PREFIX.unpack(prefix)
    if header > MAX_HEADER_BYTES or body > MAX_BODY_BYTES:
        raise FrameError(f"a frame of {header} and {body} bytes")
    return header, body


def request_frame(messages: Sequence[pb.Message], *, max_new_tokens: int, request_id: str = "") -> Frame:
    """A conversation to preprocess; the id is for the log."""
    parts = [message.SerializeToString() for message in messages]
    lengths = [len(part) for part in parts]
    return Frame(header={"request_id": request_id, "max_new_tokens": max_new_tokens, "messages": lengths}, parts=parts)


def request_id_of(header: Mapping[str, Any]) -> str:
    """Whose conversation it is."""
    return str(header["request_id"])


def read_request(header: Mapping[str, Any], body: memoryview) -> tuple[list[pb.Message], int]:
    """The conversation and its max_new_tokens."""
    messages, start = [], 0
    for count in header["messages"]:
        messages.append(pb.Message.FromString(bytes(body[start : start + count])))
        start += count
    return messages, header["max_new_tokens"]


def reply_frame(prompt: ProcessedPrompt) -> Frame:
    """What became of a conversation."""
    arrays = [*prompt.inputs.items(), ("positions", prompt.positions)]
    header = {
        "arrays": [[name, array.dtype.name, array.shape] for name, array in arrays],
        "special": prompt.special,
        "punctuation": prompt.punctuation,
        "seed": prompt.seed,
        "pixels": prompt.pixels,
        "views": prompt.views,
        "grids": [asdict(grid) for grid in prompt.grids],
    }
    return Frame(header=header, parts=[array.reshape(-1).view(np.uint8).data for _, array in arrays])


def error_frame(error: ServiceError) -> Frame:
    """Why a conversation was refused."""
    return Frame(header={"error": type(error).__name__, "message": error.message, "reason": error.reason})


def read_reply(header: Mapping[str, Any], body: memoryview) -> ProcessedPrompt:
    """The arrays of a reply; they share the memory of `body`.

    Raises:
        ServiceError: The conversation was refused.
        FrameError: The reply contradicts itself: its process had a stranger's bytes in its codecs.
    """
    try:
        if "error" in header:
            raise ERRORS[header["error"]](str(header["message"]), reason=str(header["reason"]))
        *inputs, (_, positions) = _arrays(header["arrays"], body)
        return ProcessedPrompt(
            inputs=dict(inputs),
            special=_integers(header["special"]),
            punctuation=_integers(header["punctuation"]),
            seed=int(header["seed"]),
            pixels=_integers(header["pixels"]),
            positions=positions,
            views=_integers(header["views"]),
            grids=tuple(_grid(**grid) for grid in header["grids"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FrameError("the reply makes no sense") from error


def _arrays(described: Sequence[Any], body: memoryview) -> list[tuple[str, Array]]:
    arrays, start = list[tuple[str, Array]](), 0
    for name, dtype, shape in described:
        if dtype not in DTYPES or min(shape, default=0) < 0:
            raise ValueError(f"an array of {dtype} {shape}")
        kind = np.dtype(dtype).newbyteorder("<")
        end = start + kind.itemsize * math.prod(shape)
        array = np.frombuffer(body[start:end], kind).reshape(shape)
        arrays.append((str(name), np.require(array, requirements="A")))
        start = end
    if start != len(body):
        raise ValueError("bytes of no array")
    return arrays


def _integers(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _grid(*, first_token: int, rows: int, columns: int, box: Sequence[float]) -> ImageGrid:
    left, top, right, bottom = map(float, box)
    return ImageGrid(first_token=int(first_token), rows=int(rows), columns=int(columns), box=(left, top, right, bottom))
