"""Reads video files by PyAV, which brings FFmpeg: from memory alone, and only in formats and codecs that are listed."""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

MAX_BYTES = 48 << 20
# 4096 x 2304, and some alignment.
MAX_PIXELS = 10_000_000
MIN_SIDE = 8
# Beyond it a frame that keeps within its tokens would be less than one of them wide.
MAX_ASPECT = 16
MAX_RATE = 1000.0
# FFmpeg is told which it is: left to guess, it would take playlists, too, which name files and addresses.
FORMATS = {(4, b"ftyp"): "mov", (0, b"\x1a\x45\xdf\xa3"): "matroska"}
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4")
# What PyAV raises beside its own errors.
BROKEN = (OSError, ValueError, ArithmeticError, LookupError, EOFError, RuntimeError)
# Skipping as many seconds is worth a jump to the key frame before.
SEEK_S = 5.0


class VideoError(Exception):
    """What is wrong with a video; the sentence goes on behind its name."""


@dataclass(frozen=True, kw_only=True)
class VideoFile:
    """An opened file of which the header is known.

    Attributes:
        container: PyAV's.
        duration_s: What the header says.
        rate: Frames per second on average.
    """

    container: Any
    duration_s: float
    rate: float

    def frames(self, seconds: Sequence[float]) -> Iterator[Image.Image]:
        """The frames that are shown at ascending times, upright RGB; closes the file. To be taken once.

        Raises:
            VideoError: Taking one: there is none, it is too large, or the file is corrupt.
        """
        try:
            with self.container:
                yield from self._frames(seconds)
        except (_av().FFmpegError, *BROKEN) as error:
            raise VideoError("is truncated or corrupt") from error

    def _frames(self, seconds: Sequence[float]) -> Iterator[Image.Image]:
        stream = self.container.streams.video[0]
        begins, decoded, at = _begins(stream), self.container.decode(stream), 0.0
        for wanted in seconds:
            if wanted - at > SEEK_S:
                self.container.seek(round((begins + wanted) / stream.time_base), stream=stream)
                decoded = self.container.decode(stream)
            frame = self._shown(decoded, begins + wanted)
            at = wanted
            yield frame

    def _shown(self, decoded: Iterator[Any], wanted: float) -> Image.Image:
        """The first frame that does not end before `wanted`."""
        for frame in decoded:
            check_size(frame.width, frame.height)
            if frame.time is None:
                raise VideoError("does not say when its frames are shown")
            if frame.time >= wanted - 0.5 / self.rate:
                picture: Image.Image = frame.to_image()
                return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture
        raise VideoError("ends before its header says")


def open_file(data: bytes) -> VideoFile:
    """Reads the header alone.

    Raises:
        VideoError: A forbidden format or codec, or a header that is corrupt or beyond the limits.
    """
    if len(data) > MAX_BYTES:
        raise VideoError(f"has {len(data)} bytes; at most {MAX_BYTES} are allowed")
    kind = next((name for (at, magic), name in FORMATS.items() if data[at:].startswith(magic)), None)
    if kind is None:
        raise VideoError("is no MP4, MOV, WebM or Matroska file")
    av = _av()
    try:
        return _open(av, data, kind)
    except (av.FFmpegError, *BROKEN) as error:
        raise VideoError("is truncated or corrupt") from error


def _open(av: Any, data: bytes, kind: str) -> VideoFile:
    # no protocol: what a file refers to is not opened
    options = {"protocol_whitelist": "none"}
    container = av.open(io.BytesIO(data), format=kind, options=options, metadata_errors="ignore")
    try:
        return _checked(container)
    except BaseException:
        container.close()
        raise


def _checked(container: Any) -> VideoFile:
    if not container.streams.video:
        raise VideoError("has no pictures")
    stream = container.streams.video[0]
    context = stream.codec_context
    if context is None or context.codec.canonical_name not in CODECS:
        raise VideoError(f"is coded otherwise than in {', '.join(CODECS)}")
    check_size(context.width, context.height)
    duration_s = _duration_s(container, stream)
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    if not (duration_s > 0 and math.isfinite(duration_s) and 0 < rate <= MAX_RATE):
        raise VideoError("does not say how long it is and how many frames a second it has")
    # a process has one core, and another size than the header's is not decoded
    context.thread_count = 1
    context.options = {**context.options, "max_pixels": str(MAX_PIXELS)}
    return VideoFile(container=container, duration_s=duration_s, rate=rate)


def check_size(width: int, height: int) -> None:
    """Raises VideoError where a frame is beyond the limits."""
    if not (min(width, height) >= MIN_SIDE and width * height <= MAX_PIXELS):
        limits = f"each side needs {MIN_SIDE}, and {MAX_PIXELS // 1_000_000} million are allowed"
        raise VideoError(f"has {width} x {height} pixels; {limits}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise VideoError(f"has {width} x {height} pixels; one side may be at most {MAX_ASPECT} times the other")


def _duration_s(container: Any, stream: Any) -> float:
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    # in millionths
    return (container.duration or 0) / 1e6


def _begins(stream: Any) -> float:
    return float((stream.start_time or 0) * stream.time_base)


def _av() -> Any:
    """PyAV, which an installation may go without."""
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise VideoError("is a file, which this server cannot read (it lacks PyAV): send its frames") from error
