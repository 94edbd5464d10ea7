"""From the text of a `--registry` flag to a registry."""

from __future__ import annotations

import importlib
from types import ModuleType

from shared.registry.registry import Listing, Registry

# Modules by name, so that only the one in use is loaded: without redis:// nobody needs redis-py.
REGISTRIES = {
    "static": "shared.registry.static",
    "redis": "shared.registry.redis_registry",
    "rediss": "shared.registry.redis_registry",
}
LISTINGS = {"redis": "shared.registry.redis_listing", "rediss": "shared.registry.redis_listing"}


def open_registry(location: str) -> Registry:
    """The registry at `scheme://...`, for a router. Connects when it is first asked.

    Raises:
        ValueError: The scheme is unknown, or what follows it does not fit it.
    """
    registry: Registry = _module(location, REGISTRIES).open_registry(location)
    return registry


def open_listing(location: str) -> Listing:
    """The side of the registry at `scheme://...` to which workers write. Connects when it is first used.

    Raises:
        ValueError: The scheme is unknown or its list is fixed, or what follows does not fit it.
    """
    listing: Listing = _module(location, LISTINGS).open_listing(location)
    return listing


def _module(location: str, modules: dict[str, str]) -> ModuleType:
    scheme, separator, _ = location.partition("://")
    if not separator or scheme not in modules:
        # the location itself may hold a password
        known = ", ".join(f"{name}://" for name in modules)
        raise ValueError(f"a registry starts with {known}, which this one does not")
    return importlib.import_module(modules[scheme])
