"""One request among many: what `Client.generate` takes, as a value."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from vlcache._messages import ImageSource, VideoSource
from vlcache._openai import ChatMessage
from vlcache._settings import Compression, Sampling


@dataclass(frozen=True)
class Request:
    """What is asked; the options are those of `Client.stream`. Files are read when its turn comes."""

    prompt: str | None = None
    images: Sequence[ImageSource] = field(default=(), kw_only=True)
    videos: Sequence[VideoSource] = field(default=(), kw_only=True)
    messages: Sequence[ChatMessage] | None = field(default=None, kw_only=True)
    model: str = field(default="", kw_only=True)
    sampling: Sampling | None = field(default=None, kw_only=True)
    compression: Compression | None = field(default=None, kw_only=True)
    priority: int = field(default=0, kw_only=True)
    request_id: str | None = field(default=None, kw_only=True)

    def options(self) -> dict[str, Any]:
        """The arguments of `stream`."""
        return {each.name: getattr(self, each.name) for each in fields(self)}
