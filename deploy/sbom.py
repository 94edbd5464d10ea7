"""The packages that services run on, with versions and licences, as a CycloneDX bill of materials.

`python -m deploy.sbom -o sbom.json` reads the environment that it runs in and leaves out what only development needs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "vlcache-server"
# what a service may be installed with; the other extras are for development
EXTRAS = ("worker", "http", "video", "traces")
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the bill; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="where to write it")
    args = parser.parse_args(argv)
    bill = of_services(of_environment())
    args.output.write_text(json.dumps(bill, indent=2) + "\n")
    sys.stdout.write(f"{args.output}: {len(bill['components'])} packages\n")
    return 0


def of_environment() -> dict[str, Any]:
    """The bill of everything that is installed here, in the order of names.

    Raises:
        subprocess.CalledProcessError: It could not be made, or is not valid.
    """
    command = ["cyclonedx_py", "environment", "--pyproject", str(PYPROJECT), "--output-reproducible"]
    made = subprocess.run(  # noqa: S603 - our own arguments
        [sys.executable, "-m", *command, sys.executable], check=True, capture_output=True, text=True
    )
    bill: dict[str, Any] = json.loads(made.stdout)
    return bill


def of_services(bill: dict[str, Any]) -> dict[str, Any]:
    """What of a bill services need, without where it lies on this machine."""
    wanted = needed(PROJECT, EXTRAS)
    components = [each for each in bill["components"] if canonicalize_name(each["name"]) in wanted]
    for component in components:
        references = component.get("externalReferences", [])
        component["externalReferences"] = [each for each in references if not each["url"].startswith("file:")]
    refs = {each["bom-ref"] for each in (bill["metadata"]["component"], *components)}
    # also what is only asked for by an extra, as long as it is there
    dependencies = [
        {"ref": each["ref"], "dependsOn": [ref for ref in each.get("dependsOn", ()) if ref in refs]}
        for each in bill["dependencies"]
        if each["ref"] in refs
    ]
    return {**bill, "components": components, "dependencies": dependencies}


def needed(project: str, extras: Iterable[str]) -> set[str]:
    """The installed packages that one needs with some of its extras, itself included, by their canonical names."""
    seen: set[tuple[str, str]] = set()
    waiting = [(canonicalize_name(project), extra) for extra in ("", *extras)]
    while waiting:
        package, extra = waiting.pop()
        if (package, extra) in seen or not _is_installed(package):
            continue
        seen.add((package, extra))
        for line in requires(package) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                name = canonicalize_name(requirement.name)
                waiting += [(name, wanted) for wanted in ("", *requirement.extras)]
    return {package for package, _ in seen}


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
