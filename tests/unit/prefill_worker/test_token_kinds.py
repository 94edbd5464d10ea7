"""Special tokens and punctuation, by the bundled model's tokenizer."""

from __future__ import annotations

from typing import Any

import pytest

from prefill_worker.preprocess.token_kinds import TokenKinds
from tests.unit.decode_worker.tiny import tokenizer

IMAGE = tokenizer().convert_tokens_to_ids("<image>")


class Counting:
    """A tokenizer that counts how often it is asked for a text."""

    def __init__(self) -> None:
        self.added_tokens_decoder = tokenizer().added_tokens_decoder
        self.decoded = 0

    def decode(self, tokens: list[int]) -> Any:
        self.decoded += 1
        return tokenizer().decode(tokens)


def ids_of(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_marks_of_turns_are_special_and_images_are_not() -> None:
    ids = ids_of("<s><|user|><image><image>Hi</s><|assistant|>")
    words = len(ids_of("Hi"))
    assert TokenKinds(tokenizer(), [IMAGE]).special(ids) == (0, 1, 4 + words, 5 + words)


@pytest.mark.parametrize("text", [".", "?", " .", "!", ":", '"', "_"])
def test_punctuation_with_or_without_space(text: str) -> None:
    (token,) = ids_of(text)
    kinds = TokenKinds(tokenizer(), [IMAGE])
    assert kinds.punctuation([token, token]) == (0, 1)
    assert kinds.special([token]) == ()


def test_words_spaces_signs_and_special_tokens_are_no_punctuation() -> None:
    for text in ("red", " the", " ", "\n", "7", "$", "+", "<image>", "</s>"):
        assert TokenKinds(tokenizer(), [IMAGE]).punctuation(ids_of(text)) == (), text


def test_each_token_of_the_vocabulary_is_looked_at_once() -> None:
    counting = Counting()
    kinds = TokenKinds(counting, [IMAGE])
    ids = ids_of("One, two, three, four; one, two.") * 3
    assert kinds.punctuation(ids) == kinds.punctuation(ids)
    assert counting.decoded == len(set(ids))
