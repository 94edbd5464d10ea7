"""What became of a second question under one way of keeping the images for it."""

from __future__ import annotations

from dataclasses import dataclass

from vlcache.v1 import inference_pb2 as public

from benchmarks.quality.setting import Setting

FULL = "full"
"""The full cache."""
OWN = "own"
"""The whole prompt is prefilled and compressed for this question."""
PREFIX = "prefix"
"""The full KV of the images was retained; the text alone is prefilled, then all is compressed for this question."""
SAME = "same"
"""As `OTHER`, but what was kept of the images was kept for this question: between them only the choice differs."""
OTHER = "other"
"""What was kept of the images for the first question, and all of this question's text, prefilled over it."""


WAYS = (OWN, PREFIX, SAME, OTHER)
"""Those that compress."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One answer.

    Attributes:
        way: `FULL`, `OWN`, `PREFIX`, `SAME` or `OTHER`.
        task: Of the second question.
        apart: Whether no patch that carries its answer carries the first question's, too.
        right: Exact match, surrounding white space aside.
        compression: What was kept.
    """

    way: str
    setting: Setting
    task: str
    apart: bool
    right: bool
    compression: public.Compression


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A policy's choices from a pass of its own and from the retained prefix: what the first kept, and what both did.

    The unit is one token of one layer and KV head.
    """

    setting: Setting
    kept: int
    common: int
