"""How much is looked at of one video, unless the worker is told otherwise."""

from __future__ import annotations

MAX_VIDEO_FRAMES = 64
MAX_VIDEO_TOKENS = 8192
# Fewer could not show a frame that is much longer than wide.
MIN_FRAME_TOKENS = 8
