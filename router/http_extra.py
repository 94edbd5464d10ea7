"""The door to `router.http`, whose libraries only a router with an HTTP port loads."""

from __future__ import annotations

import importlib
from typing import Any

# By name: without a port nothing of it is loaded.
SERVER = "router.http.server"


def http_server() -> Any:
    """`router.http.server`.

    Raises:
        ValueError: A library is missing.
    """
    try:
        return importlib.import_module(SERVER)
    except ImportError as error:
        raise ValueError(f"an HTTP port needs more libraries: pip install '.[http]' ({error})") from error
