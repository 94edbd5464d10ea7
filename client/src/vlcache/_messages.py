"""Builds the request: messages, images from paths, bytes or PIL images, videos, and the request id."""

import io
import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import grpc

from vlcache._channel import MAX_MESSAGE_BYTES
from vlcache._errors import InvalidRequest
from vlcache._settings import Compression, Sampling
from vlcache.v1 import inference_pb2

ROLES = ("system", "user", "assistant")
MAX_PRIORITY = 100
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class SavableImage(Protocol):
    """What is needed of a PIL image, so that Pillow need not be installed."""

    def save(self, fp: Any, format: str | None = None) -> None:
        """Encodes the image into a binary file."""


ImageSource = str | os.PathLike[str] | bytes | SavableImage


@dataclass(frozen=True)
class Image:
    """An image within a message: a path, the bytes of a PNG, JPEG or WEBP file, or a PIL image (sent as PNG)."""

    source: ImageSource

    def read(self) -> bytes:
        """The encoded file. Raises OSError when a path cannot be read, ValueError when there is nothing in it."""
        if isinstance(self.source, str | os.PathLike | bytes):
            return _file(self.source, "an image")
        return _encoded(self.source)


def _file(source: str | os.PathLike[str] | bytes, what: str) -> bytes:
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    if not data:
        raise ValueError(f"{what} is empty")
    return data


def _encoded(source: SavableImage) -> bytes:
    if not hasattr(source, "save"):
        raise TypeError(f"an image is a path, bytes or a PIL image, not {type(source).__name__}")
    buffer = io.BytesIO()
    source.save(buffer, format="PNG")
    return buffer.getvalue()


VideoSource = str | os.PathLike[str] | bytes | Sequence[ImageSource]


@dataclass(frozen=True)
class Video:
    """A video within a message: a path or the bytes of an MP4, MOV, WebM or Matroska file, or frames, all of one size.

    fps: frames per second of frames; when None, they were chosen at `sample_fps`, and all are looked at.
    sample_fps: frames per second that are looked at; 2 when None.
    max_frames: frames that are looked at, at most; the service has a limit of its own.
    """

    source: VideoSource
    fps: float | None = field(default=None, kw_only=True)
    sample_fps: float | None = field(default=None, kw_only=True)
    max_frames: int | None = field(default=None, kw_only=True)

    def to_proto(self) -> inference_pb2.Video:
        """The video of the contract.

        Raises OSError when a path cannot be read, ValueError when there is nothing in it or a file has an `fps`.
        """
        wanted: dict[str, Any] = {"sample_fps": self.sample_fps, "max_frames": self.max_frames}
        if isinstance(self.source, str | os.PathLike | bytes):
            if self.fps is not None:
                raise ValueError("a video file has its own fps")
            return inference_pb2.Video(file=_file(self.source, "a video"), **wanted)
        images = [inference_pb2.Image(data=Image(frame).read()) for frame in self.source]
        if not images:
            raise ValueError("a video has no frames")
        return inference_pb2.Video(frames=inference_pb2.Frames(images=images, fps=self.fps), **wanted)


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a chat.

    role: "system", "user" or "assistant".
    parts: text, images and videos, in the order in which the model reads them.

    Raises ValueError when the role is unknown or there are no parts.
    """

    role: str
    parts: Sequence[str | Image | Video]

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {self.role!r}")
        if isinstance(self.parts, str) or not self.parts:
            raise ValueError("parts must be a sequence of at least one text, Image or Video")

    def to_proto(self) -> inference_pb2.Message:
        """The message of the contract; reads and encodes images and videos."""
        return inference_pb2.Message(role=self.role, parts=[_part(part) for part in self.parts])


def _part(part: str | Image | Video) -> inference_pb2.Part:
    if isinstance(part, str):
        return inference_pb2.Part(text=part)
    if isinstance(part, Video):
        return inference_pb2.Part(video=part.to_proto())
    return inference_pb2.Part(image=inference_pb2.Image(data=part.read()))


def build_request(
    *,
    prompt: str | None,
    images: Sequence[ImageSource],
    videos: Sequence[VideoSource],
    messages: Sequence[Message] | None,
    model: str,
    sampling: Sampling | None,
    compression: Compression | None,
    priority: int,
    request_id: str | None,
) -> inference_pb2.GenerateRequest:
    """The request of one call. It always has an id, so that every attempt carries the same.

    Raises ValueError when an option contradicts another or is out of its range, OSError when an image or a video cannot
    be read, and InvalidRequest when the request is larger than the service accepts.
    """
    request = inference_pb2.GenerateRequest(
        request_id=_checked_id(uuid.uuid4().hex if request_id is None else request_id),
        model=model,
        messages=[message.to_proto() for message in _conversation(prompt, images, videos, messages)],
        sampling=None if sampling is None else sampling.to_proto(),
        compression=None if compression is None else compression.to_proto(),
        priority=_checked_priority(priority),
    )
    _check_size(request)
    return request


def _conversation(
    prompt: str | None,
    images: Sequence[ImageSource],
    videos: Sequence[VideoSource],
    messages: Sequence[Message] | None,
) -> Sequence[Message]:
    if messages is None:
        if prompt is None:
            raise ValueError("give a prompt or messages")
        return [Message(role="user", parts=[*map(Image, images), *map(Video, videos), prompt])]
    if prompt is not None or images or videos:
        raise ValueError(
            "messages carry their own text, images and videos: give no prompt, images or videos beside them"
        )
    if not messages:
        raise ValueError("messages must not be empty")
    return messages


def _checked_id(request_id: str) -> str:
    if not _REQUEST_ID.fullmatch(request_id):
        raise ValueError(f"request_id must be 1 to 128 of [A-Za-z0-9._:-], got {request_id!r}")
    return request_id


def _checked_priority(priority: int) -> int:
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise ValueError(f"priority must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}], got {priority}")
    return priority


def _check_size(request: inference_pb2.GenerateRequest) -> None:
    request_bytes = request.ByteSize()
    if request_bytes > MAX_MESSAGE_BYTES:
        raise InvalidRequest(
            f"the request has {request_bytes} bytes, more than the {MAX_MESSAGE_BYTES} that the service accepts",
            code=grpc.StatusCode.INVALID_ARGUMENT,
            request_id=request.request_id,
        )
