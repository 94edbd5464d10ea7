"""What the reader of a lost worker has of an answer: which tokens are fed again, and are not sent."""

from __future__ import annotations

from shared.errors import InvalidRequestError


def tokens_to_replay(
    delivered: tuple[int, ...], generated: tuple[int, ...], *, max_new_tokens: int, vocabulary: int
) -> tuple[int, ...]:
    """The delivered tokens that did not come with the parcel.

    Args:
        delivered: The answer so far, as its reader has it. Where that is less than came with the parcel, the prefill
            worker has sent the rest.
        generated: Tokens that came with the parcel.
        max_new_tokens: Of the answer.
        vocabulary: Number of token ids.

    Raises:
        InvalidRequestError: The reader's answer is not the parcel's, or nothing can follow it.
    """
    known = min(len(delivered), len(generated))
    _require(delivered[:known] == generated[:known], "the delivered tokens are not the parcel's")
    _require(len(delivered) < max_new_tokens, "the last token was delivered already")
    _require(max(delivered, default=0) < vocabulary, "a delivered token is not in the vocabulary")
    return delivered[known:]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidRequestError(message, reason="DELIVERED")
