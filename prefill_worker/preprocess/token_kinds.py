"""Which tokens of a prompt are no words: special tokens and punctuation."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any


class TokenKinds:
    """Looks at each token of the vocabulary once, when a prompt first has it. Thread-safe: every look gives the same.

    Args:
        visual_token_ids: Special to the tokenizer, but they stand for images and videos.
    """

    def __init__(self, tokenizer: Any, visual_token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.added_tokens_decoder
        self._special = {token for token, added in self._added.items() if added.special}.difference(visual_token_ids)
        self._punctuation: dict[int, bool] = {}

    def special(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Positions of special tokens, ascending."""
        return _positions(ids, self._special.__contains__)

    def punctuation(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Positions of tokens whose text is punctuation alone, whatever space is around it."""
        return _positions(ids, self._is_punctuation)

    def _is_punctuation(self, token: int) -> bool:
        known = self._punctuation.get(token)
        if known is None:
            text = "" if token in self._added else self._tokenizer.decode([token]).strip()
            known = bool(text) and all(unicodedata.category(character).startswith("P") for character in text)
            self._punctuation[token] = known
        return known


def _positions(ids: Sequence[int], wanted: Callable[[int], bool]) -> tuple[int, ...]:
    return tuple(at for at, token in enumerate(ids) if wanted(token))
