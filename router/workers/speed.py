"""How fast a prefill worker is, as the router sees it."""

from __future__ import annotations

# Weight that an observation keeps when the next one comes: about the last ten count.
DECAY = 0.9
# Before anything was observed all workers are alike; the value only weighs their queues against decode memory.
FIRST_TOKENS_PER_S = 2000.0


class Speed:
    """Prompt tokens per second, over the last prompts: their tokens in all by their time in all.

    A prompt's tokens are counted with those that stood before it, its time with their time. So the figure is what
    turns a queue into the seconds until its end, however the worker orders or overlaps its work, and whoever else
    sends it requests. It includes the hand-over of the parcel, until which the request stays on the worker.
    """

    def __init__(self, typical: Speed | None = None) -> None:
        """`typical` speaks for this one until it knows something itself."""
        self._typical = typical
        self._tokens = 0.0
        self._seconds = 0.0
        self._is_cold = True

    @property
    def tokens_per_s(self) -> float:
        """The figure, or the best guess."""
        if self._seconds:
            return self._tokens / self._seconds
        return self._typical.tokens_per_s if self._typical else FIRST_TOKENS_PER_S

    def observe(self, tokens: int, seconds: float) -> None:
        """A prompt is done, `seconds` (more than 0) after it was sent behind others, `tokens` with theirs.

        A worker's first one is not counted: it tells how long a process takes to warm up, and who looks slow is hardly
        asked again.
        """
        if self._typical is not None and self._is_cold:
            self._is_cold = False
            return
        self._tokens = DECAY * self._tokens + tokens
        self._seconds = DECAY * self._seconds + seconds
        if self._typical is not None:
            self._typical.observe(tokens, seconds)
