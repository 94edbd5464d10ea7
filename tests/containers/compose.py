"""The compose file as docs/operations.md has it started, by podman-compose."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping

from tests.containers.machine import BASE, BUILD_S, Machine

log = logging.getLogger("containers")

# deploy/docker/debian.yml says why: no registry is reached from here, and Debian has no Grafana.
FILES = ("-f", "docker-compose.yml", "-f", "deploy/docker/debian.yml", "--profile", "cpu")
PATIENCE_S = 180.0
# stop_grace_period of the services
GRACE_S = 40


class Compose:
    """Commands on the services of the compose file."""

    def __init__(self, machine: Machine, *files: str, more: Mapping[str, str] | None = None) -> None:
        """
        Args:
            files: More of them, over those that are always there.
            more: Variables of those.
        """
        self._machine = machine
        self._files = ("-f", "docker-compose.yml", *(word for file in files for word in ("-f", file)), *FILES[2:])
        self._settings = {
            "VLCACHE_REDIS_PASSWORD": secrets.token_hex(16),
            "BASE": BASE,
            # what pip is configured with
            "TORCH_INDEX": "",
            # answers are compared token by token, whatever batches they shared
            "DTYPE": "float32",
            **(more or {}),
        }

    def build(self) -> None:
        """All images, one after the other; what older sources left of images goes a day later."""
        options = f"--podman-build-args={' '.join(self._machine.build_options)}"
        self._machine.follow(
            "podman-compose", *self._files, options, "--parallel=1", "build", more=self._settings, timeout_s=BUILD_S
        )
        self._machine.podman("image", "prune", "--force", "--filter=until=24h")

    def up(self, *scales: str) -> None:
        """Starts what does not run, in the background."""
        options = [word for scale in scales for word in ("--scale", scale)]
        self._run("up", "--detach", "--no-build", *options)

    def stop(self) -> None:
        """Stops everything as its grace periods allow."""
        for container in self._replicas():
            self._machine.podman("stop", f"--time={GRACE_S}", container, timeout_s=PATIENCE_S)
        self._run("stop")

    def down(self) -> None:
        """Stops what runs, and removes it with its volumes and its network."""
        for container in self._replicas():
            self._machine.podman("rm", "--force", container)
        self._run("down", "--volumes")

    def containers(self, service: str = "") -> list[str]:
        """Ids of the containers of a service, or of all."""
        wanted = [f"--filter=label=com.docker.compose.service={service}"] if service else []
        return self._machine.podman("ps", "--all", "--quiet", "--no-trunc", *wanted).split()

    def name(self, container: str) -> str:
        """What podman-compose calls a container."""
        return self._machine.inspect(container)["Name"]

    def wait_healthy(self, count: int) -> None:
        """Until the health checks of so many containers succeed, run here for want of a timer that runs them."""
        wait_until(lambda: len(self.containers()) == count, f"there are not {count} containers")
        for container in self.containers():
            name = self.name(container)
            wait_until(lambda name=name: self._is_healthy(name), f"{name} is not healthy")
            log.info("%s is healthy", name)

    def _replicas(self) -> list[str]:
        """Those beyond the first of each service: podman-compose stops and removes as many as the file has."""
        return [name for name in map(self.name, self.containers()) if not name.endswith("_1")]

    def _is_healthy(self, container: str) -> bool:
        return self._machine.succeeds("podman", "healthcheck", "run", container)

    def _run(self, *arguments: str) -> None:
        log.info("podman-compose %s", " ".join(arguments))
        self._machine.run("podman-compose", *self._files, *arguments, more=self._settings, timeout_s=PATIENCE_S)


def wait_until(met: Callable[[], object], otherwise: str, timeout_s: float = PATIENCE_S) -> None:
    give_up = time.monotonic() + timeout_s
    while not met():
        assert time.monotonic() < give_up, otherwise
        time.sleep(0.5)
