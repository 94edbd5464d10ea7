"""Stacks of real processes, one per transport, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deploy.local.stack import StackConfig
from tests.integration.reference import Reference
from tests.integration.running_stack import RunningStack

EXACT = ("--dtype", "fp32")


def stack_config(transport: str, **more: object) -> StackConfig:
    """Exact arithmetic; `grpc` never maps the arena."""
    return StackConfig(worker_flags=EXACT, decode_flags=("--transport", transport), **more)


@pytest.fixture(scope="session")
def memory_stack() -> Iterator[RunningStack]:
    with RunningStack(stack_config("auto")) as stack:
        yield stack
    assert stack.clean, "a process did not end with exit code 0"


@pytest.fixture(scope="session")
def grpc_stack() -> Iterator[RunningStack]:
    with RunningStack(stack_config("grpc")) as stack:
        yield stack
    assert stack.clean, "a process did not end with exit code 0"


@pytest.fixture(params=["memory", "grpc"])
def stack(request: pytest.FixtureRequest) -> RunningStack:
    """The same test over both transports."""
    return request.getfixturevalue(f"{request.param}_stack")


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference()
