"""The demonstration in a network of its own that is slow and drops packets."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest

from deploy.local.forks import ROOT

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

# Packets that come faster than this and find 32 KB waiting are dropped.
LIMITED = "ip link set lo mtu 1500 up && tc qdisc add dev lo root tbf rate 40mbit burst 16kb limit 32kb"


def in_namespace(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["unshare", "--net", "sh", "-c", f"{LIMITED} && {script}"], cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    missing = [name for name in ("unshare", "ip", "tc") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"there is no {', '.join(missing)}")
    tried = in_namespace("true")
    if tried.returncode:
        pytest.skip(f"no network namespace with a rate limit here: {tried.stderr.strip()}")


def test_a_slow_network_that_drops_packets_costs_no_answer() -> None:
    ran = in_namespace(f"{sys.executable} -m deploy.local demo --json - && tc -s qdisc show dev lo")
    assert ran.returncode == 0, ran.stderr
    summary = next(json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{"))["summary"]
    assert summary["answered"] == summary["questions"] > 0
    dropped = re.search(r"dropped (\d+)", ran.stdout)
    assert dropped is not None
    assert int(dropped[1]) > 0
