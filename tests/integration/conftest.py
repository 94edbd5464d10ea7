"""Stacks of real processes, one per way of a parcel, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deploy.local.stack import StackConfig
from tests.integration.reference import Reference
from tests.integration.running_stack import RunningStack

EXACT = ("--dtype", "fp32")
COMBINED = {"prefill_workers": 0, "decode_workers": 0, "combined_workers": 1}


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


@pytest.fixture(scope="session")
def combined_stack() -> Iterator[RunningStack]:
    """Both halves in one process."""
    with RunningStack(stack_config("auto", **COMBINED)) as stack:
        yield stack
    assert stack.clean, "a process did not end with exit code 0"


@pytest.fixture(params=["memory", "grpc", "combined"])
def stack(request: pytest.FixtureRequest) -> RunningStack:
    """The same test over every way of a parcel."""
    return request.getfixturevalue(f"{request.param}_stack")


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference()
