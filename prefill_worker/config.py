"""Settings of a prefill worker."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from prefill_worker.preprocess.video_limits import MAX_VIDEO_FRAMES, MAX_VIDEO_TOKENS, MIN_FRAME_TOKENS
from shared.config import WorkerConfig
from shared.flags import COMPRESSION, COMPUTE, FAILURES, LIMITS, MEMORY, NETWORK
from shared.rpc.identity import PREFILL
from shared.rpc.options import MIB

AT_LEAST_ONE = (
    "arena_mib",
    "max_images",
    "max_new_tokens",
    "max_video_frames",
    "max_waiting",
    "preprocess_processes",
    "preprocess_memory_mib",
    "preprocess_queue_mib",
)
NOT_NEGATIVE = ("vision_cache_mib", "prefix_cache_mib", "retained_mib")
POSITIVE = ("preprocess_timeout_s", "parcel_lease_s")


@dataclass(frozen=True, kw_only=True)
class PrefillConfig(WorkerConfig):
    """Settings of a prefill worker, parsed once from the command line."""

    roles: ClassVar[tuple[str, ...]] = (PREFILL,)

    name: Annotated[str, NETWORK] = "prefill-0"
    """Name of this worker in placements, metrics and logs."""
    arena_mib: Annotated[int, MEMORY] = 256
    """Shared memory for parcels, MiB."""
    retained_mib: Annotated[int | None, MEMORY] = None
    """Parcels that stay in the arena after their transfer, to be sent again when a decode worker is lost, MiB at most;
    half of it when absent, so that new parcels find room without giving one up each time. 0 keeps none."""
    parcel_lease_s: Annotated[float, FAILURES] = 30.0
    """Life of a retained parcel without renewal, seconds."""
    socket_dir: Annotated[Path, NETWORK] = field(default_factory=lambda: Path(tempfile.gettempdir()) / "vlcache-arenas")
    """Private directory of the Unix socket that hands the arena to decode workers on this host."""
    max_images: Annotated[int, LIMITS] = 16
    """Images and videos of one request at most."""
    max_video_frames: Annotated[int, LIMITS] = MAX_VIDEO_FRAMES
    """Frames that are looked at of one video, at most."""
    max_video_tokens: Annotated[int, LIMITS] = MAX_VIDEO_TOKENS
    """Visual tokens of one video at most: frames are shown smaller where they would be more. At least 8 per frame."""
    max_new_tokens: Annotated[int, LIMITS] = 4096
    """Largest `max_new_tokens` that a request may ask for."""
    default_max_new_tokens: Annotated[int, LIMITS] = 256
    """`max_new_tokens` of a request that names none."""
    default_retention: Annotated[float, COMPRESSION] = 0.10
    """Kept share of a request that names none, in (0, 1]."""
    max_dropped_attention: Annotated[float, COMPRESSION] = 1.0
    """Quality guard of a request that names none: the largest weight, in [0, 1], that one of an answer's first tokens
    may give a dropped token, mean over layers, before more is kept; 1 is off."""
    cascade: Annotated[bool, COMPRESSION] = False
    """Drop KV layer by layer during a prefill, where the policy allows it: the same parcels from far less memory, for
    some more work in each layer."""
    early_shipping: Annotated[bool, COMPRESSION] = False
    """Send KV that is certain to be kept while the prefill goes on, where it travels over gRPC; needs `--cascade`.
    Gains on slow links alone."""
    max_waiting: Annotated[int, LIMITS] = 256
    """Requests admitted and not yet computing; more are refused."""
    vision_cache_mib: Annotated[int, MEMORY] = 256
    """What the vision tower made of images that may come again, MiB of the device at most; 0 keeps none."""
    prefix_cache_mib: Annotated[int, MEMORY] = 0
    """Full KV of prompts up to their last image, for more questions about the same images: MiB of the device at most;
    0 keeps none. An image takes as much as its tokens' KV before compression."""
    prefill_chunk: Annotated[int, COMPUTE] = 4096
    """Longer prompts pass through the model in pieces of so many tokens, which bounds the memory of activations; 0
    passes every prompt at once."""
    preprocess_processes: Annotated[int, COMPUTE] = 2
    """Processes that decode images and tokenise."""
    preprocess_timeout_s: Annotated[float, FAILURES] = 20.0
    """Time that decoding and tokenising one request may take, seconds; its process is then replaced."""
    preprocess_memory_mib: Annotated[int, MEMORY] = 2048
    """Memory for data that each process that decodes and tokenises may have, MiB."""
    preprocess_queue_mib: Annotated[int, MEMORY] = 512
    """Requests that wait for such a process, MiB together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.default_retention <= 1:
            raise ValueError(f"default_retention must lie in (0, 1], not {self.default_retention}")
        if not 0 <= self.max_dropped_attention <= 1:
            raise ValueError(f"max_dropped_attention must lie in [0, 1], not {self.max_dropped_attention}")
        if self.early_shipping and not self.cascade:
            raise ValueError("early_shipping needs cascade, which knows what is certain")
        if not 1 <= self.default_max_new_tokens <= self.max_new_tokens:
            raise ValueError("default_max_new_tokens must lie between 1 and max_new_tokens")
        if self.max_model_len is not None and self.default_max_new_tokens >= self.max_model_len:
            raise ValueError("default_max_new_tokens must leave room for a prompt within max_model_len")
        if self.prefill_chunk < 0 or self.prefill_chunk == 1:
            raise ValueError(f"prefill_chunk must be 0, or 2 at least, not {self.prefill_chunk}")
        self._check_ranges()

    def _check_ranges(self) -> None:
        if self.max_video_tokens < MIN_FRAME_TOKENS * self.max_video_frames:
            raise ValueError(f"max_video_tokens must be at least {MIN_FRAME_TOKENS} per frame of max_video_frames")
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in NOT_NEGATIVE:
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        for name in POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")

    @property
    def retained_bytes(self) -> int:
        """Bytes that parcels may take up after their transfer."""
        return self.arena_mib * MIB // 2 if self.retained_mib is None else self.retained_mib * MIB
