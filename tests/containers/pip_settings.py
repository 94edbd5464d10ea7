"""What this machine's pip is configured with, for builds that must not know it: a file, and the folders it names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Of the machine's user, not of the indexes.
LEFT_OUT = ("disable-pip-version-check", "no-cache-dir", "cache-dir", "require-virtualenv")


class PipSettings:
    """The merged settings of files and environment."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "pip", "config", "list"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        self._values: dict[str, str] = {}
        # files first, then what overrides them: the environment
        for line in sorted(listed, key=lambda line: line.startswith(":env:")):
            name, _, value = line.partition("=")
            key = name.rpartition(".")[2]
            if key not in LEFT_OUT:
                self._values[key] = ast.literal_eval(value)

    def write(self, path: Path) -> None:
        """As a pip.conf."""
        lines = [f"{key} = {' '.join(value.split())}" for key, value in self._values.items()]
        path.write_text("\n".join(["[global]", *lines, ""]))

    @property
    def folders(self) -> list[Path]:
        """Local files and folders that the settings name. Pages of a local index point to its siblings."""
        found = set()
        for word in " ".join(self._values.values()).split():
            path = Path(unquote(urlsplit(word).path) if word.startswith("file://") else word)
            if path.is_absolute() and path.exists():
                found.add(path.parent if path.name == "simple" else path)
        return sorted(found)
