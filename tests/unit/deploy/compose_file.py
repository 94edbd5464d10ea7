"""docker-compose.yml as Compose reads it, and the command lines that its containers would run."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.integration.prometheus_server import ROOT

FILE = ROOT / "docker-compose.yml"
SECURE = ROOT / "deploy" / "docker" / "secure.yml"
HTTP = ROOT / "deploy" / "docker" / "http.yml"
# ${NAME}, ${NAME:-default}, ${NAME:?complaint}
VARIABLE = re.compile(r"(?<!\$)\$\{(\w+)(?::([-?])([^}]*))?\}")
# What a container is called.
HOSTNAME = "3f2a9c0d1e5b"


def read(values: Mapping[str, str], file: Path = FILE) -> dict[str, Any]:
    """The document of `file` with `values` for variables, defaults for others, and `$$` as the dollar it stands for.

    Raises:
        KeyError: A variable has neither.
    """

    def value(found: re.Match[str]) -> str:
        name, kind, default = found.groups()
        return values.get(name, default) if kind == "-" else values[name]

    return yaml.safe_load(VARIABLE.sub(value, file.read_text()).replace("$$", "$"))


def arguments(service: Mapping[str, Any], folder: Path) -> list[str]:
    """What a container of the service hands to `python`: its entry point runs, with another python in its way."""
    python = folder / "python"
    echo = "import json, sys; print(json.dumps(sys.argv[1:]))"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{echo}' \"$@\"\n")
    python.chmod(stat.S_IRWXU)
    hostname = service.get("hostname", HOSTNAME)
    environment = {**service["environment"], "HOSTNAME": hostname, "PATH": f"{folder}:/usr/bin:/bin"}
    command = [*service["entrypoint"], *service.get("command", [])]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
