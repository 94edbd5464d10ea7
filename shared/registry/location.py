"""From the text of a `--registry` flag to a registry."""

from __future__ import annotations

from collections.abc import Callable

from shared.registry.registry import Registry
from shared.registry.static import StaticRegistry

PARSERS: dict[str, Callable[[str], Registry]] = {"static": StaticRegistry.parse}


def open_registry(location: str) -> Registry:
    """The registry at `scheme://...`.

    Raises:
        ValueError: The scheme is unknown, or what follows it does not fit it.
    """
    scheme, separator, rest = location.partition("://")
    if not separator or scheme not in PARSERS:
        known = ", ".join(f"{name}://" for name in PARSERS)
        raise ValueError(f"a registry starts with {known}; {location!r} does not")
    return PARSERS[scheme](rest)
