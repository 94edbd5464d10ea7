"""Where a router looks for workers."""

from __future__ import annotations

import pytest

from router.config import RouterConfig


@pytest.mark.parametrize("location", ["static://a:1,b.example:65535,[::1]:7", "redis://host", "rediss://me@host:1/2"])
def test_a_router_takes_every_kind_of_registry(location: str) -> None:
    assert RouterConfig(registry=location).registry == location


@pytest.mark.parametrize(
    "location",
    ["", "static", "static:a:1", "static://", "static://a", "static://a:0", "static://a:65536", "static://:1",
     "static://a:x", "static://a:²", "static://a:1,a:1", "redis://", "redis://host:x"],
)  # fmt: skip
def test_a_bad_location_is_a_value_error(location: str) -> None:
    with pytest.raises(ValueError):
        RouterConfig(registry=location)
