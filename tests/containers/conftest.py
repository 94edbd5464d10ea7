"""One stack of containers for this folder: built, brought up, and taken down in the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.containers.compose import Compose
from tests.containers.machine import Machine, check_possible

# router, prefill, redis, prometheus and two decode workers
CONTAINERS = 6


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    check_possible()
    with Machine() as running:
        yield running


@pytest.fixture(scope="session")
def images(machine: Machine) -> Compose:
    """Everything that the compose file builds."""
    compose = Compose(machine)
    machine.make_base()
    compose.build()
    return compose


@pytest.fixture(scope="session")
def service(machine: Machine, images: Compose) -> Compose:
    """The service with two decode workers, healthy; the machine takes away what is left of it."""
    machine.cut_off()
    images.up("decode=2")
    images.wait_healthy(CONTAINERS)
    return images
