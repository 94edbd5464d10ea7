"""Locations of registries."""

from __future__ import annotations

import asyncio

import pytest

from shared.registry.location import open_registry


def test_static_lists_what_it_was_given() -> None:
    registry = open_registry("static://a:1, b.example:65535,[::1]:7,")
    assert list(asyncio.run(registry.addresses())) == ["a:1", "b.example:65535", "[::1]:7"]


@pytest.mark.parametrize(
    "location",
    ["", "static", "static:a:1", "static://", "static://a", "static://a:0", "static://a:65536", "static://:1",
     "static://a:x", "static://a:²", "static://a:1,a:1", "redis://here"],
)  # fmt: skip
def test_a_bad_location_is_a_value_error(location: str) -> None:
    with pytest.raises(ValueError):
        open_registry(location)
