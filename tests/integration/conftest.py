"""Stacks of real processes, one per way of a parcel, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deploy.local.forks import Forks
from deploy.local.stack import StackConfig
from shared.config import Dtype
from tests.integration.reference import Reference
from tests.integration.running_stack import RunningStack

EXACT: Dtype = "float32"
COMBINED = {"prefill_workers": 0, "decode_workers": 0, "combined_workers": 1}


def stack_config(transport: str, **more: object) -> StackConfig:
    """Exact arithmetic; `grpc` never maps the arena."""
    return StackConfig(dtype=EXACT, decode_flags=("--transport", transport), **more)


@pytest.fixture(scope="package")
def memory_stack(forks: Forks) -> Iterator[RunningStack]:
    with RunningStack(stack_config("auto"), forks) as stack:
        yield stack
    assert stack.clean, "a process did not end with exit code 0"


@pytest.fixture(scope="package")
def grpc_stack(forks: Forks) -> Iterator[RunningStack]:
    with RunningStack(stack_config("grpc"), forks) as stack:
        yield stack
    assert stack.clean, "a process did not end with exit code 0"


@pytest.fixture(scope="package")
def combined_stack(forks: Forks) -> Iterator[RunningStack]:
    """Both halves in one process."""
    with RunningStack(stack_config("auto", **COMBINED), forks) as stack:
        yield stack
    assert stack.clean, "a process did not end with exit code 0"


@pytest.fixture(params=["memory", "grpc", "combined"])
def stack(request: pytest.FixtureRequest) -> RunningStack:
    """The same test over every way of a parcel."""
    return request.getfixturevalue(f"{request.param}_stack")


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference()
