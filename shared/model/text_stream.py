"""From token ids to text, piece by piece: no broken UTF-8, no part of a stop string.

Deterministic in the token ids, so a worker that continues a sequence rebuilds the state by pushing its tokens again.
"""

from __future__ import annotations

from typing import Any

REPLACEMENT = "�"
# A UTF-8 character has at most four bytes; a longer run of broken ones will not heal.
MAX_OPEN_TOKENS = 4


class TextStream:
    """Text of one sequence.

    Args:
        tokenizer: A transformers tokenizer; special tokens become no text.
        stop: The text ends before the one that is complete first (of several that are, the longest).
        min_tokens: What is complete with fewer tokens is no stop string.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = (), *, min_tokens: int = 0) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._min_tokens = min_tokens
        self._tokens: list[int] = []
        # tokens[context:] are decoded with every push, and the first `sent` characters of that are out; of them
        # tokens[context:complete] are only the left context of what follows
        self._context = 0
        self._complete = 0
        self._sent = 0
        self._held = ""
        # characters of it that came with fewer tokens than there must be: no stop string ends among them
        self._too_early = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """Adds a token; returns the text that became certain. After `stopped` there is none."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        return self._release(self._decode_open(final=False), final=False)

    def finish(self) -> str:
        """The text still held back, once no token will follow."""
        if self.stopped:
            return ""
        return self._release(self._decode_open(final=True), final=True)

    def _decode_open(self, *, final: bool) -> str:
        text = self._decode(self._tokens[self._context :])
        sent = self._sent
        if final or not text.endswith(REPLACEMENT):
            self._context, self._complete = self._complete, len(self._tokens)
            self._sent = len(self._decode(self._tokens[self._context :]))
            return text[sent:]
        if len(self._tokens) - self._complete > MAX_OPEN_TOKENS:
            # broken bytes for good, but the last of them may begin a character
            self._sent = max(sent, len(text) - 1)
        return text[sent : self._sent]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _release(self, text: str, *, final: bool) -> str:
        self._held += text
        # the one that is complete first: what a later token might have added must not matter
        found = self._completed_stops()
        if found:
            self.stopped = True
            return self._held[: min(found)[1]]
        keep = 0 if final else self._possible_stop()
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._too_early = max(0, self._too_early - len(released))
        return released

    def _completed_stops(self) -> list[tuple[int, int]]:
        """(end, begin) of the stop strings in the held text that are not too early."""
        if len(self._tokens) < self._min_tokens:
            self._too_early = len(self._held)
            return []
        begins = ((stop, self._held.find(stop, max(0, self._too_early + 1 - len(stop)))) for stop in self._stop)
        return [(at + len(stop), at) for stop, at in begins if at >= 0]

    def _possible_stop(self) -> int:
        """Length of the longest tail of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0
