"""How a service tells its parent process where it listens: one JSON line on stdout."""

from __future__ import annotations

import json
import sys


def announce(*, name: str, role: str, address: str, metrics_address: str, http_address: str = "") -> None:
    """Prints the line that a launcher waits for; ports picked by the kernel are known only now."""
    line = {"event": "listening", "name": name, "role": role, "address": address, "metrics": metrics_address}
    if http_address:
        line["http"] = http_address
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
