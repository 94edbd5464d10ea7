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
        stop: Strings before whose first occurrence the text ends.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens: list[int] = []
        # text of tokens[context:complete] is out; it is decoded again as left context of what follows
        self._context = 0
        self._complete = 0
        self._held = ""
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
        before = self._decode(self._tokens[self._context : self._complete])
        text = self._decode(self._tokens[self._context :])
        open_tokens = len(self._tokens) - self._complete
        if text.endswith(REPLACEMENT) and open_tokens <= MAX_OPEN_TOKENS and not final:
            return ""
        self._context, self._complete = self._complete, len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _release(self, text: str, *, final: bool) -> str:
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = 0 if final else self._possible_stop()
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return released

    def _possible_stop(self) -> int:
        """Length of the longest tail of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0
