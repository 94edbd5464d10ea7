"""What preprocessing must know of a family of models that its processor does not tell.

A family is added here when its prompts differ from the default's; what processors and models tell is asked of them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class VideoRule:
    """How a family reads videos.

    Attributes:
        timestamps: Whether each temporal patch is a run of tokens of its own behind the second it shows, as Qwen3-VL's.
        pixels_together: Whether the processor's bounds of pixels are those of all frames, not of each.
        to_the_end: Whether frames are sampled up to the last one, in any number; else from the first on, in pairs.
    """

    timestamps: bool = False
    pixels_together: bool = False
    to_the_end: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """The default: a token has one position, and all visual tokens of an image are a grid over the whole of it.

    Attributes:
        mrope: Whether a token has positions in time, height and width, as Qwen2-VL's.
        tiles: Whether an image may become several views, whose tokens are no grid over the image.
        video: How it reads videos; None where it reads none.
    """

    mrope: bool = False
    tiles: bool = False
    video: VideoRule | None = None


DEFAULT = Family()
FAMILIES = {
    "llava": DEFAULT,
    "gemma3": DEFAULT,
    "llava_next": Family(tiles=True),
    "llava_onevision": Family(tiles=True),
    "internvl": Family(tiles=True),
    "idefics3": Family(tiles=True),
    "smolvlm": Family(tiles=True),
    "qwen2_vl": Family(mrope=True, video=VideoRule()),
    "qwen2_5_vl": Family(mrope=True, video=VideoRule()),
    "qwen3_vl": Family(mrope=True, video=VideoRule(timestamps=True, pixels_together=True, to_the_end=True)),
}
"""By `model_type`."""


def family_of(model_type: str) -> Family:
    """The family's entry; the default of one that has none."""
    return FAMILIES.get(model_type, DEFAULT)


def video_families() -> list[str]:
    """Those that read videos."""
    return sorted(name for name, family in FAMILIES.items() if family.video)
