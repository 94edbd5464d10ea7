"""Takes in a parcel that comes in waves: what it is, its trailer says."""

from __future__ import annotations

from collections.abc import AsyncIterator

from shared.errors import DataLossError, InvalidRequestError
from shared.kv.manifest import Manifest
from shared.kv.transport.frames import Chunk, decode_later
from shared.kv.waves import travelling_bytes


async def receive_waves(frames: AsyncIterator[bytes], buffer: memoryview) -> tuple[Manifest, int]:
    """Fills the beginning of the buffer from chunks that must come in order and without a gap, up to the trailer.

    Args:
        buffer: As long as the reservation allows.

    Returns:
        What came, and how many bytes it has on its way.

    Raises:
        InvalidRequestError: More came than was reserved, or what came is not what the trailer says.
        DataLossError: Bytes were lost or changed.
    """
    received = 0
    async for message in frames:
        frame = decode_later(message)
        if not isinstance(frame, Chunk):
            return await _ended(frames, Manifest.from_proto(frame.manifest), received)
        end = received + len(frame.data)
        if frame.offset != received:
            raise InvalidRequestError("a chunk is out of place", reason="TRANSFER_FRAME")
        if end > len(buffer):
            raise InvalidRequestError("the parcel is larger than its reservation", reason="OVER_RESERVATION")
        buffer[received:end] = frame.data
        received = end
    raise DataLossError(f"the parcel ended after {received} bytes without a trailer", reason="PARCEL_TRUNCATED")


async def _ended(frames: AsyncIterator[bytes], manifest: Manifest, received: int) -> tuple[Manifest, int]:
    """Nothing follows a trailer, and nothing is missing before it."""
    if manifest.encoding is not None:
        raise InvalidRequestError("rows that are encoded do not come in waves", reason="TRANSFER_FRAME")
    if received != travelling_bytes(manifest):
        raise InvalidRequestError("the trailer says something else than what came", reason="TRANSFER_FRAME")
    async for _ in frames:
        raise InvalidRequestError("a trailer is the last message", reason="TRANSFER_FRAME")
    return manifest, received
