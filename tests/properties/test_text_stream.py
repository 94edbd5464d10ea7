"""Text that comes out token by token is the text of all tokens, whole characters at a time, up to the stop string."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from models.shapes_vlm.paths import CHECKPOINT
from shared.model.text_stream import REPLACEMENT, TextStream

unicode = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
STOP_ALPHABET = "ab é😀"
stops = st.lists(st.text(STOP_ALPHABET, min_size=1, max_size=4), min_size=1, max_size=4).map(tuple)


@functools.cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@functools.cache
def byte_tokens() -> dict[int, int]:
    """The token of each single byte, in the byte-level alphabet of GPT-2."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(others)}
    return {byte: tokenizer().convert_tokens_to_ids(name) for byte, name in names.items()}


def bytes_to_ids(raw: bytes) -> list[int]:
    return [byte_tokens()[byte] for byte in raw]


def whole(ids: list[int]) -> str:
    return tokenizer().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stream(ids: list[int], stop: tuple[str, ...] = (), min_tokens: int = 0) -> tuple[list[str], bool]:
    made = TextStream(tokenizer(), stop, min_tokens=min_tokens)
    deltas = [made.push(token) for token in ids]
    return [*deltas, made.finish()], made.stopped


# single bytes of characters and special tokens are much more frequent than in any real text
random_ids = st.lists(
    st.one_of(
        st.integers(0, 524),
        st.sampled_from([0xF0, 0x9F, 0x98, 0x80, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xFF]).map(lambda byte: -byte),
        st.integers(0, 3),
    ),
    max_size=30,
).map(lambda drawn: [byte_tokens()[-token] if token < 0 else token for token in drawn])


def test_every_byte_has_its_token() -> None:
    for raw in ("é€😀".encode(), b"plain"):
        assert whole(bytes_to_ids(raw)) == raw.decode()


@given(unicode)
def test_any_text_comes_out_as_it_went_in(text: str) -> None:
    for ids in (tokenizer().encode(text, add_special_tokens=False), bytes_to_ids(text.encode())):
        assert "".join(stream(ids)[0]) == whole(ids)


@given(random_ids)
@example([])
def test_any_tokens_give_the_text_of_all_of_them(ids: list[int]) -> None:
    assert "".join(stream(ids)[0]) == whole(ids)


@pytest.mark.parametrize(
    "prefix", [b"", b"\x80", b"\x80" * 3, b"\x80" * 4, b"\x80" * 9, b"\xf0\x9f\x98" * 3, b"\xff" * 5]
)
def test_a_character_after_broken_bytes_is_whole(prefix: bytes) -> None:
    ids = bytes_to_ids(prefix + "😀é".encode())
    assert "".join(stream(ids)[0]) == whole(ids)
    assert "".join(stream(ids)[0]).endswith("😀é")


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_special_tokens_inside_a_character_do_not_break_it(count: int) -> None:
    start, *rest = bytes_to_ids("😀".encode())
    ids = [start, *[tokenizer().eos_token_id] * count, *rest]
    assert "".join(stream(ids)[0]) == "😀"


@given(unicode)
def test_no_delta_ends_inside_a_character(text: str) -> None:
    raw, out = text.encode(), b""
    made = TextStream(tokenizer())
    for at, token in enumerate(bytes_to_ids(raw)):
        delta = made.push(token)
        assert REPLACEMENT not in delta or REPLACEMENT in text
        out += delta.encode()
        assert raw.startswith(out)
        # at most what is incomplete is held back, or a character that looks like a broken one
        held = raw[len(out) : at + 1]
        assert len(held) < 4 or REPLACEMENT in text
    assert out + made.finish().encode() == raw


def test_a_sequence_that_ends_inside_a_character_says_so_only_at_the_end() -> None:
    deltas, _ = stream(bytes_to_ids(b"a\xf0\x9f\x98"))
    assert deltas == ["a", "", "", "", REPLACEMENT]


def test_broken_bytes_do_not_hold_text_back_forever() -> None:
    made = TextStream(tokenizer())
    out = "".join(made.push(token) for token in bytes_to_ids(b"\x80" * 50))
    assert len(out) >= 45


def cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, of several the longest; character by character."""
    for end in range(1, len(text) + 1):
        complete = [word for word in stop if text[:end].endswith(word)]
        if complete:
            return text[: end - len(max(complete, key=len))], True
    return text, False


@given(st.lists(st.text(STOP_ALPHABET, max_size=5), max_size=8), stops)
def test_text_is_cut_at_the_first_stop_string_however_it_is_split(pieces: list[str], stop: tuple[str, ...]) -> None:
    text = "".join(pieces)
    by_piece = [token for piece in pieces for token in tokenizer().encode(piece, add_special_tokens=False)]
    for ids in (by_piece, tokenizer().encode(text, add_special_tokens=False), bytes_to_ids(text.encode())):
        deltas, stopped = stream(ids, stop)
        assert ("".join(deltas), stopped) == cut(text, stop)


@given(random_ids, stops)
def test_no_output_contains_a_stop_string(ids: list[int], stop: tuple[str, ...]) -> None:
    deltas, stopped = stream(ids, stop)
    assert not any(word in "".join(deltas) for word in stop)
    assert stopped == any(word in whole(ids) for word in stop)


def test_overlapping_stop_strings_do_not_depend_on_the_split() -> None:
    for pieces in (["xabcd"], ["x", "a", "b", "c", "d"], ["xa", "bcd"]):
        ids = [token for piece in pieces for token in tokenizer().encode(piece, add_special_tokens=False)]
        assert "".join(stream(ids, ("abcd", "bc"))[0]) == "xa"


def test_a_stop_string_inside_a_longer_one_ends_the_text_also_when_both_come_in_one_token() -> None:
    """What is complete first counts, as if the word had come letter by letter."""
    (word,) = tokenizer().encode(" circle", add_special_tokens=False)
    for ids in ([word], bytes_to_ids(b" circle")):
        assert "".join(stream(ids, (" circle", "ir"))[0]) == " c"


def test_after_a_stop_string_there_is_no_text() -> None:
    made = TextStream(tokenizer(), ("stop",))
    for token in tokenizer().encode("go stop", add_special_tokens=False):
        made.push(token)
    assert made.stopped
    assert [made.push(token) for token in bytes_to_ids(b"more")] == [""] * 4
    assert made.finish() == ""


def test_what_might_begin_a_stop_string_is_held_until_it_does_not() -> None:
    made = TextStream(tokenizer(), ("###",))
    assert [made.push(token) for token in bytes_to_ids(b"a##b##")] == ["a", "", "", "##b", "", ""]
    assert made.finish() == "##"
    assert not made.stopped


@given(random_ids, random_ids, stops)
def test_a_rebuilt_stream_goes_on_as_the_first_would_have(
    first: list[int], second: list[int], stop: tuple[str, ...]
) -> None:
    original = TextStream(tokenizer(), stop)
    before = [original.push(token) for token in first]
    rebuilt = TextStream(tokenizer(), stop)
    assert [rebuilt.push(token) for token in first] == before
    for token in second:
        assert rebuilt.push(token) == original.push(token)
    assert (rebuilt.finish(), rebuilt.stopped) == (original.finish(), original.stopped)


@given(st.text(STOP_ALPHABET, max_size=20), stops, st.integers(0, 12))
@example("xbyy", ("b", "xbyy"), 3)
def test_a_stop_string_that_comes_too_early_is_text(text: str, stop: tuple[str, ...], min_tokens: int) -> None:
    """A token is a byte here: what ends with the first of those that end late enough."""
    ids = bytes_to_ids(text.encode())
    ends = [
        (end, end - len(each))
        for each in stop
        for end in range(len(each), len(text) + 1)
        if text[:end].endswith(each) and len(text[:end].encode()) >= min_tokens
    ]
    texts, stopped = stream(ids, stop, min_tokens)
    assert stopped == bool(ends)
    assert "".join(texts) == (text[: min(ends)[1]] if ends else text)
