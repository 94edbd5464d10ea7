"""deploy/docker/Dockerfile: linted, small where it can be, and in step with the rest of the repository."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from shared.rpc.options import MALLOC_ENVIRONMENT
from tests.integration.prometheus_server import ROOT
from tests.unit.deploy.dockerfile import DOCKERFILE, of

FILES = sorted(DOCKERFILE.parent.glob("*Dockerfile"))
OWN_FOLDER = {"router": "router", "prefill": "prefill_worker", "decode": "decode_worker"}

each_image = pytest.mark.parametrize("image", OWN_FOLDER)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_hadolint_has_no_complaint(file: Path) -> None:
    command = shutil.which("hadolint", path=sysconfig.get_path("scripts"))
    assert command is not None
    # versions of Debian's packages are those of the base's release
    done = subprocess.run([command, "--ignore=DL3008", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@each_image
def test_an_image_has_the_folders_of_its_service_and_no_other(image: str) -> None:
    copied = [source for source, _ in (rest.rsplit(" ", 1) for rest in of(image, "COPY")) if "--from" not in source]
    model = [] if image == "router" else ["models/shapes_vlm/checkpoint"]
    assert sorted(copied) == sorted(["pyproject.toml", "client", "shared", OWN_FOLDER[image], *model])
    assert all((ROOT / source).exists() for source in copied)


@each_image
def test_an_image_runs_its_service_as_nobody_special(image: str) -> None:
    assert of(image, "ENTRYPOINT") == [f'["python", "-m", "{OWN_FOLDER[image]}"]']
    assert (ROOT / OWN_FOLDER[image] / "__main__.py").is_file()
    assert of(image, "USER")[-1] == "10001:10001"
    assert of(image, "STOPSIGNAL") == ["SIGTERM"]
    (check,) = of(image, "HEALTHCHECK")
    assert check.endswith('CMD ["python", "-m", "shared.rpc.probe"]')


@pytest.mark.parametrize(
    ("image", "extras"), [("router", ["http"]), ("decode", ["worker"]), ("prefill", ["worker", "video"])]
)
def test_an_image_has_the_packages_of_its_service(image: str, extras: list[str]) -> None:
    installed = " ".join(of(image, "RUN"))
    assert re.findall(r"-e '\.\[(.*?)\]'", installed) == extras
    assert ('"$TORCH"' in installed) == ("worker" in extras)


def test_workers_get_the_memory_settings_of_every_worker() -> None:
    for image in ("prefill", "decode"):
        words = " ".join(of(image, "ENV")).split()
        assert {word for word in words if word.startswith("MALLOC_")} == {
            f"{name}={value}" for name, value in MALLOC_ENVIRONMENT.items()
        }


def test_images_have_the_torch_of_make_setup() -> None:
    (default,) = re.findall(r"^TORCH \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f"TORCH={default}" in of("worker", "ARG")
