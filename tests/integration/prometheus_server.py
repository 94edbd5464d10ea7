"""A real Prometheus for tests: the configuration that is shipped, on a free port, looking at a running stack."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.redis_server import free_port

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "deploy" / "prometheus"
# Where `make prometheus` unpacks it.
UNPACKED = ROOT / "build" / "prometheus" / "usr" / "bin"
GIVE_UP_S = 60.0


def find_binary(name: str) -> str:
    """`prometheus` or `promtool`, of the machine or of `make prometheus`."""
    found = shutil.which(name) or shutil.which(name, path=str(UNPACKED))
    if found is None:
        pytest.skip(f"there is no {name}: run `make prometheus`, or apt install prometheus")
    return found


class PrometheusServer:
    """Use as a context manager. Scrapes `targets` (host:port of /metrics) every other second."""

    def __init__(self, folder: Path, targets: Iterable[str]) -> None:
        self._binary = find_binary("prometheus")
        self._folder = folder
        self._targets = list(targets)
        self._address = f"127.0.0.1:{free_port()}"
        self.url = f"http://{self._address}"

    def __enter__(self) -> PrometheusServer:
        self._write_config()
        flags = [
            f"--config.file={self._folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address={self._address}",
            "--log.level=warn",
        ]
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen([self._binary, *flags], stdout=log, stderr=log)
        try:
            self.wait_for(self._answers)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()

    def query(self, expr: str) -> list[dict[str, Any]]:
        """An instant vector, now."""
        return self.get("query", query=expr)["result"]

    def query_range(self, expr: str, *, start_s: float, end_s: float) -> list[dict[str, Any]]:
        """A matrix, one point per second of Unix time."""
        return self.get("query_range", query=expr, start=start_s, end=end_s, step=1)["result"]

    def get(self, path: str, **parameters: object) -> Any:
        """The data of an answer of the HTTP API.

        Raises:
            AssertionError: It was an error, such as an expression that cannot be read.
        """
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=GIVE_UP_S) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def wait_for(self, ready: Callable[[], object]) -> None:
        """Until `ready` says so."""
        give_up = time.monotonic() + GIVE_UP_S
        while not ready():
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < give_up, f"not in {GIVE_UP_S:g} s"
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            self.get("status/buildinfo")
        except (OSError, AssertionError):
            return False
        return True

    def _write_config(self) -> None:
        """The shipped one, quicker, and without names that nobody resolves here."""
        config = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
        # a scrape may take as long as an interval, and a busy machine is slow
        config["global"] = {"scrape_interval": "2s", "evaluation_interval": "1s"}
        (job,) = config["scrape_configs"]
        del job["dns_sd_configs"]
        (self._folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        shutil.copy(SHIPPED / "rules.yml", self._folder)
        (self._folder / "targets").mkdir()
        (self._folder / "targets" / "stack.json").write_text(json.dumps([{"targets": self._targets}]))
