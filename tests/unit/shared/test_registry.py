"""Which workers a `--registry` flag names."""

from __future__ import annotations

import asyncio

import pytest

from shared.registry.location import open_registry
from shared.registry.static import StaticRegistry


def test_a_static_registry_lists_its_addresses_in_order() -> None:
    registry = open_registry("static://b:2, a:1,[::1]:3,")
    assert asyncio.run(registry.addresses()) == ("b:2", "a:1", "[::1]:3")


@pytest.mark.parametrize("location", ["", "static", "redis://host:1", "host:1", "STATIC://host:1"])
def test_an_unknown_scheme_is_refused_and_the_known_ones_are_named(location: str) -> None:
    with pytest.raises(ValueError, match="static://"):
        open_registry(location)


@pytest.mark.parametrize("location", ["static://", "static:// , "])
def test_an_empty_list_is_refused(location: str) -> None:
    with pytest.raises(ValueError, match="at least one worker"):
        open_registry(location)


def test_a_worker_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="once"):
        StaticRegistry(["a:1", "a:1"])


@pytest.mark.parametrize("address", ["a", "a:", ":1", "a:0", "a:65536", "a:-1", "a:x", "a:\u0661", "a:1 "])
def test_an_address_that_is_not_host_and_port_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        StaticRegistry([address])
