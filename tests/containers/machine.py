"""Podman with processes, mounts, a network and a store of its own: nothing of the machine is touched."""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.containers.pip_settings import PipSettings

log = logging.getLogger("containers")

ROOT = Path(__file__).parents[2]
# Images stay here from one run to the next, beside what `make prometheus` unpacks.
STORE = ROOT / "build" / "containers"
BASE = "localhost/vlcache/base"
DEBIAN = "bookworm"
# What the services' Dockerfile asks of a base, and no more.
PACKAGES = ("python3", "python3-venv", "ca-certificates")
BASE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NEEDED = (
    "podman",
    "runc",
    "netavark",
    "aardvark-dns",
    "catatonit",
    "mmdebstrap",
    "nsenter",
    "unshare",
    "ip",
    "iptables",
)
# Debian keeps some of Podman's parts off the path.
PLACES = os.pathsep.join([os.defpath, "/usr/sbin", "/sbin", "/usr/lib/podman", "/usr/libexec/podman"])
# An image is packed on one core, and pip may have to fetch hundreds of megabytes.
BUILD_S = 1200.0
# Where Podman and its helpers keep what they know of running containers, wherever they are told to.
RUN_FOLDERS = ("/run/containers", "/run/netns", "/run/runc")
# How Podman announces a step of a build.
STEP = re.compile(r"(\[\d+/\d+\] )?(STEP|COMMIT)")
LAST_LINES = 40
# At the end: in which containers are removed that depend on each other.
ROUNDS = 10

CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
conmon_env_vars = ["PATH={path}", "CONTAINERS_CONF={run}/containers.conf", "CONTAINERS_STORAGE_CONF={run}/storage.conf"]
tmp_dir = "{run}/libpod"
[network]
network_backend = "netavark"
network_config_dir = "{run}/networks"
"""
STORAGE_CONF = """
[storage]
driver = "overlay"
graphroot = "{store}/storage"
runroot = "{run}/storage"
"""


def check_possible() -> None:
    """Skips where containers cannot run, and says what is missing."""
    if os.geteuid() != 0:
        pytest.skip("containers with a network of their own need root here")
    path = os.pathsep.join([os.environ.get("PATH", ""), PLACES])
    if missing := [name for name in NEEDED if shutil.which(name, path=path) is None]:
        pytest.skip(f"there is no {', '.join(missing)}: see CONTRIBUTING.md")


class Machine:
    """Use as a context manager. Leaving it removes every container, volume and network; images stay."""

    def __init__(self) -> None:
        self._exits = contextlib.ExitStack()
        self._pip = PipSettings()

    def __enter__(self) -> Machine:
        with contextlib.ExitStack() as exits:
            # Unix sockets lie below, and their paths are short
            self._run = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="vlcache-podman-")))
            STORE.mkdir(parents=True, exist_ok=True)
            # What Podman remembers beside the images, with folders of an earlier run in it. It cannot live elsewhere:
            # a container's end is noted by a Podman that is told of the store only.
            for memory in ("libpod", "volumes"):
                shutil.rmtree(STORE / "storage" / memory, ignore_errors=True)
            (self._run / "containers.conf").write_text(CONTAINERS_CONF.format(run=self._run, path=PLACES))
            (self._run / "storage.conf").write_text(STORAGE_CONF.format(run=self._run, store=STORE))
            self._pip.write(self._run / "pip.conf")
            self._holder = self._open_namespaces()
            exits.callback(self._close_namespaces)
            # what a run has left that was killed
            self._remove_everything()
            exits.callback(self._remove_everything)
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._exits.close()

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", ""), PLACES]),
            "CONTAINERS_CONF": str(self._run / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self._run / "storage.conf"),
        }

    def run(
        self, *command: str, timeout_s: float = 60.0, more: Mapping[str, str] | None = None, online: bool = False
    ) -> str:
        """What a command prints that runs among the containers.

        Args:
            more: Environment variables.
            online: With the machine's network instead, as builds need it.

        Raises:
            AssertionError: It failed; the text has all that it said.
        """
        environment = {**self.environment, **(more or {})}
        done = subprocess.run(
            [*self._entrance(online=online), *command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def follow(self, *command: str, timeout_s: float, more: Mapping[str, str]) -> None:
        """Runs a long command with the machine's network, and logs the steps of the builds in it.

        Raises:
            AssertionError: It failed, or took too long; the text has the last that it said.
        """
        running = subprocess.Popen(
            [*self._entrance(online=True), *command],
            cwd=ROOT,
            env={**self.environment, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        last: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        alarm = threading.Timer(timeout_s, running.kill)
        alarm.start()
        with running:
            assert running.stdout is not None
            for line in running.stdout:
                last.append(line)
                if STEP.match(line):
                    log.info("%s", line.strip()[:100])
        alarm.cancel()
        assert running.returncode == 0, f"{command[0]}: {running.returncode}\n{''.join(last)}"

    def succeeds(self, *command: str) -> bool:
        """Whether a command that runs among the containers exits with 0."""
        entered = [*self._entrance(online=False), *command]
        return subprocess.run(entered, cwd=ROOT, env=self.environment, capture_output=True).returncode == 0

    def start(self, *command: str) -> subprocess.Popen[str]:
        """A command among the containers that goes on; its output is a pipe, its errors are the terminal's."""
        return subprocess.Popen(
            [*self._entrance(online=False), *command],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
        )

    def podman(self, *arguments: str, timeout_s: float = 60.0) -> str:
        """What `podman ARGUMENTS` prints."""
        return self.run("podman", *arguments, timeout_s=timeout_s)

    def inspect(self, name: str) -> dict[str, Any]:
        """What Podman knows of a container."""
        (document,) = json.loads(self.podman("container", "inspect", name))
        return document

    def make_base(self) -> None:
        """A minimal Debian, unless there is one already."""
        if self._exists(BASE):
            return
        log.info("making a minimal Debian")
        archive = self._run / "base.tar"
        options = ["--variant=minbase", f"--include={','.join(PACKAGES)}", "--quiet"]
        self.run("mmdebstrap", *options, DEBIAN, str(archive), timeout_s=BUILD_S, online=True)
        self.podman("import", "--quiet", "--change", f"ENV PATH={BASE_PATH}", str(archive), BASE, timeout_s=BUILD_S)
        archive.unlink()

    @property
    def build_options(self) -> list[str]:
        """Of `podman build`: where pip looks on this machine, which the Dockerfiles do not know."""
        mounts = [f"--volume={folder}:{folder}:ro" for folder in self._pip.folders]
        secret = f"--secret=id=pip,src={self._run / 'pip.conf'}"
        # in Docker's own format: the other one has no HEALTHCHECK
        return ["--format=docker", "--isolation=oci", "--network=host", secret, *mounts]

    def cut_off(self) -> None:
        """Lets nobody ask the machine's name servers any more, which cannot be reached from among the containers."""
        nobody = self._run / "resolv.conf"
        nobody.write_text("nameserver 127.0.0.1\n")
        self.run("mount", "--bind", str(nobody), "/etc/resolv.conf")

    def _exists(self, image: str) -> bool:
        listed = self.podman("images", "--format", "{{.Repository}}")
        return image in listed.split()

    def _entrance(self, *, online: bool) -> list[str]:
        own = Path(f"/proc/{self._holder.pid}/ns")
        entered = [f"--mount={own / 'mnt'}", f"--pid={own / 'pid_for_children'}"]
        return ["nsenter", *entered, *([] if online else [f"--net={own / 'net'}"]), "--", "env", f"--chdir={ROOT}"]

    def _open_namespaces(self) -> subprocess.Popen[bytes]:
        """A process in whose namespaces everything runs, and with which everything ends."""
        private = " && ".join(f"mkdir -p {folder} && mount -t tmpfs tmpfs {folder}" for folder in RUN_FOLDERS)
        script = f"{private} && ip link set lo up && echo open && exec catatonit -- sleep infinity"
        options = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        holder = subprocess.Popen(
            ["unshare", *options, "sh", "-c", script], env=self.environment, stdout=subprocess.PIPE
        )
        assert holder.stdout is not None
        if holder.stdout.readline() != b"open\n":
            holder.wait()
            pytest.skip("no namespaces can be made here")
        return holder

    def _close_namespaces(self) -> None:
        self._holder.kill()
        self._holder.communicate()

    def _remove_everything(self) -> None:
        for _ in range(ROUNDS):
            left = self.podman("ps", "--all", "--external", "--quiet").split()
            if not left:
                break
            # those that others depend on are refused, or gone, while these end
            self.succeeds("podman", "rm", "--force", "--depend", "--ignore", "--time=1", *left)
        self.podman("volume", "prune", "--force")
        self.podman("network", "prune", "--force")
