"""The door to what draws; the only part of the client that needs Pillow."""

import importlib
from typing import Any


def picture_module() -> Any:
    """`vlcache.explain.picture`. Raises ValueError without Pillow."""
    try:
        return importlib.import_module("vlcache.explain.picture")
    except ImportError as error:
        raise ValueError(f"drawing needs Pillow: pip install 'vlcache[explain]' ({error})") from error
