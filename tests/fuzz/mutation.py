"""Input that nobody would send: messages of any content, and bytes that were right once."""

from __future__ import annotations

import random
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

MAX_DEPTH = 4
NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 65_535, 1 << 24, (1 << 31) - 1)
UNSIGNED = (*NUMBERS, (1 << 32) - 1)
WIDE = (*UNSIGNED, 1 << 40, (1 << 63) - 1)
FLOATS = (0.0, -0.0, 1.0, 0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), 32_769.0)
TEXTS = ("", "a", "tiny", "vl_cache", "\x00", "é😀", "../../etc/passwd", "%s%n", "a" * 300, "user", "system", "x:1")
F = FieldDescriptor
INTEGERS = {
    F.TYPE_INT32: (*NUMBERS, -1, -(1 << 31)),
    F.TYPE_SINT32: (*NUMBERS, -1, -(1 << 31)),
    F.TYPE_UINT32: UNSIGNED,
    F.TYPE_INT64: (*WIDE, -1, -(1 << 63)),
    F.TYPE_UINT64: (*WIDE, (1 << 64) - 1),
    F.TYPE_FIXED64: (*WIDE, (1 << 64) - 1),
}


def mutated(chance: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """`data` after one to four accidents; `others` lend pieces."""
    made = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        accident = chance.choice((_flip, _set, _cut, _repeat, _insert, _splice))
        accident(chance, made, others)
    return bytes(made)


def strange(chance: random.Random, message: Message, depth: int = 0) -> Message:
    """`message` with some fields changed to anything that their types allow."""
    for field in message.DESCRIPTOR.fields:
        if chance.random() < 0.25:
            _change(chance, message, field, depth)
    return message


def _change(chance: random.Random, message: Message, field: FieldDescriptor, depth: int) -> None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        _fill_map(chance, getattr(message, field.name), field.message_type)
    elif field.is_repeated:
        _fill_repeated(chance, getattr(message, field.name), field, depth)
    elif field.type == F.TYPE_MESSAGE:
        if depth < MAX_DEPTH and not field.message_type.full_name.startswith("google."):
            strange(chance, getattr(message, field.name), depth + 1)
            getattr(message, field.name).SetInParent()
    elif chance.random() < 0.2:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _value(chance, field))


def _fill_map(chance: random.Random, entries: Any, entry: Descriptor) -> None:
    if entry.fields_by_name["value"].type != F.TYPE_MESSAGE:
        for _ in range(chance.randint(0, 3)):
            entries[_value(chance, entry.fields_by_name["key"])] = _value(chance, entry.fields_by_name["value"])


def _fill_repeated(chance: random.Random, values: Any, field: FieldDescriptor, depth: int) -> None:
    kept = list(values)
    if chance.random() < 0.5:
        # one of those that were there, or none: counts then disagree
        del values[chance.randrange(len(kept) + 1) :]
    for _ in range(chance.choice((0, 1, 2, 40))):
        if field.type == F.TYPE_MESSAGE:
            if depth < MAX_DEPTH:
                strange(chance, values.add(), depth + 1)
        else:
            values.append(_value(chance, field))


def _value(chance: random.Random, field: FieldDescriptor) -> Any:
    if field.type in INTEGERS:
        return chance.choice(INTEGERS[field.type])
    if field.type in (F.TYPE_DOUBLE, F.TYPE_FLOAT):
        return chance.choice([number for number in FLOATS if field.type == F.TYPE_DOUBLE or abs(number) != 1e308])
    if field.type == F.TYPE_BOOL:
        return chance.random() < 0.5
    if field.type == F.TYPE_STRING:
        return chance.choice(TEXTS)
    if field.type == F.TYPE_BYTES:
        return chance.randbytes(chance.choice((0, 1, 15, 16, 17, 64)))
    assert field.type == F.TYPE_ENUM, field.type
    # also those that are not in the contract
    return chance.choice((0, 1, 2, 99))


def _flip(chance: random.Random, made: bytearray, others: list[bytes]) -> None:
    if made:
        made[chance.randrange(len(made))] ^= 1 << chance.randrange(8)


def _set(chance: random.Random, made: bytearray, others: list[bytes]) -> None:
    if made:
        made[chance.randrange(len(made))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))


def _cut(chance: random.Random, made: bytearray, others: list[bytes]) -> None:
    first, last = sorted((chance.randint(0, len(made)), chance.randint(0, len(made))))
    del made[first:last]


def _repeat(chance: random.Random, made: bytearray, others: list[bytes]) -> None:
    first = chance.randint(0, len(made))
    piece = made[first : first + chance.choice((1, 4, 60))]
    made[first:first] = piece * chance.randint(1, 4)


def _insert(chance: random.Random, made: bytearray, others: list[bytes]) -> None:
    at = chance.randint(0, len(made))
    made[at:at] = chance.randbytes(chance.choice((1, 2, 8)))


def _splice(chance: random.Random, made: bytearray, others: list[bytes]) -> None:
    other = chance.choice(others)
    made[chance.randint(0, len(made)) :] = other[chance.randint(0, len(other)) :]
