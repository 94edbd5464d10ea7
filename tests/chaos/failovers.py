"""How answers went on elsewhere, as the router counts it."""

from __future__ import annotations

from tests.integration.running_stack import RunningStack

COUNTER = "vlcache_failovers_total{"


def failovers(stack: RunningStack, kind: str) -> float:
    """Those of one kind since the router started: resend, reprefill or migration."""
    lines = [line for line in stack.metrics("router").splitlines() if line.startswith(COUNTER)]
    return sum(float(line.rpartition(" ")[2]) for line in lines if f'kind="{kind}"' in line)
