"""Opens videos that strangers sent: what is looked at of them is decided from headers, before a frame is decoded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image
from vlcache.v1 import inference_pb2 as pb

from prefill_worker.preprocess.images import open_image
from prefill_worker.preprocess.video_file import MAX_RATE, VideoError, check_size, open_file
from shared.errors import InvalidRequestError

# What transformers' processors of Qwen sample, too.
SAMPLE_FPS = 2.0
MIN_FRAMES = 4
# Frames of one temporal patch: as many of a video are looked at, or twice as many, and so on.
PAIR = 2
MAX_DURATION_S = 3600.0
# The longest that a frame may stand still.
MIN_RATE = 0.01

# Which of so many frames are looked at, where there are so many per second.
Sampling = Callable[[int, float], list[int]]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What is looked at of a video.

    Attributes:
        frames: RGB, as many as `seconds`; decoded as they are taken, once.
        seconds: When each is shown, from the video's beginning.
        fps: Of these frames.
    """

    frames: Iterator[Image.Image]
    seconds: tuple[float, ...]
    fps: float


def open_clip(video: pb.Video, index: int, *, max_frames: int, to_the_end: bool = False) -> Clip:
    """What is looked at of one video; taking its frames raises as this does.

    Args:
        index: Which video of the request this is, for the message.
        max_frames: Frames that are looked at, at most.
        to_the_end: See `VideoRule`.

    Raises:
        InvalidRequestError: Not a video, a forbidden format, or beyond the limits.
    """
    try:
        most = min(max_frames, int(_positive(video, "max_frames", max_frames)))
        fps = _positive(video, "sample_fps", SAMPLE_FPS)
        kind = video.WhichOneof("source")
        if kind is None:
            raise VideoError("is empty")
        sample = partial(sampled, fps=fps, most=most, to_the_end=to_the_end)
        clip = _of_file(video.file, sample) if kind == "file" else _of_frames(video.frames, fps, sample)
    except VideoError as error:
        raise _bad(index, error) from error
    return Clip(frames=_frames(clip, index), seconds=clip.seconds, fps=clip.fps)


def sampled(total: int, rate: float, *, fps: float, most: int, to_the_end: bool) -> list[int]:
    """Indices of frames, evenly: `fps` per second where there are `rate`, as far as `most` allows.

    Args:
        to_the_end: From the first to the last one; otherwise from the first on, and an even number of them, but for a
            video of one frame.
    """
    wanted = min(max(total / rate * fps, MIN_FRAMES), most, total)
    if to_the_end:
        return [int(at) for at in np.linspace(0, total - 1, max(int(wanted), 1)).round()]
    count = max(int(wanted) // PAIR * PAIR, 1)
    return [step * total // count for step in range(count)]


def _of_file(data: bytes, sample: Sampling) -> Clip:
    file = open_file(data)
    total = max(1, round(file.duration_s * file.rate))
    _check_duration(total / file.rate)
    indices = sample(total, file.rate)
    seconds = tuple(index / file.rate for index in indices)
    return Clip(frames=file.frames(seconds), seconds=seconds, fps=len(indices) / total * file.rate)


def _of_frames(frames: pb.Frames, fps: float, sample: Sampling) -> Clip:
    total = len(frames.images)
    if not total:
        raise VideoError("is empty")
    rate = frames.fps if frames.HasField("fps") else fps
    if not MIN_RATE <= rate <= MAX_RATE:
        raise VideoError(f"has {rate:g} frames per second; {MIN_RATE:g} to {MAX_RATE:g} are allowed")
    _check_duration(total / rate)
    indices = sample(total, rate)
    opened = (_frame(frames.images[index].data, index) for index in indices)
    seconds = tuple(index / rate for index in indices)
    return Clip(frames=opened, seconds=seconds, fps=len(indices) / total * rate)


def _frame(data: bytes, index: int) -> Image.Image:
    try:
        frame = open_image(data, index)
    except InvalidRequestError as error:
        raise VideoError(f"has a bad frame: {error.message}") from error
    check_size(*frame.size)
    return frame


def _frames(clip: Clip, index: int) -> Iterator[Image.Image]:
    """Of one size, in the number that was promised."""
    size: Sequence[int] | None = None
    try:
        for frame in clip.frames:
            if size is not None and frame.size != size:
                raise VideoError("has frames of different sizes")
            size = frame.size
            yield frame
    except VideoError as error:
        raise _bad(index, error) from error


def _check_duration(seconds: float) -> None:
    if seconds > MAX_DURATION_S:
        raise VideoError(f"has {seconds:.0f} s; at most {MAX_DURATION_S:.0f} are allowed")


def _positive(video: pb.Video, field: str, default: float) -> float:
    value = getattr(video, field) if video.HasField(field) else default
    if not (value > 0 and math.isfinite(value)):
        raise VideoError(f"asks for {field} = {value:g}; it must be positive")
    return value


def _bad(index: int, error: VideoError) -> InvalidRequestError:
    return InvalidRequestError(f"video {index + 1} {error}", reason="BAD_VIDEO")
