"""What holds for every test: kernels need no GPU, hypothesis no deadline, and nothing may be left in shared memory."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from deploy.local.forks import Forks
from deploy.local.stack import Modules

TESTS = Path(__file__).parent
# Whole files that take long and fail seldom (`make heavy`): the suite stays below ten minutes on two cores.
HEAVY = ("families", "integration/test_dashboards.py", "kernels/test_compilation.py", "unit/benchmarks")

SHARED_MEMORY = Path("/dev/shm")
GPU_DRIVER = Path("/dev/nvidiactl")

# Triton decides at its import, and again at each kernel's, whether kernels are interpreted, and torch imports it on the
# side: only this file is early enough for every order of test modules. With a GPU the kernels run for real.
if not GPU_DRIVER.exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("vlcache", deadline=None)
settings.load_profile("vlcache")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a suite that was started in the background ignores ctrl-C, and so would the processes that it tests
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # slow files first: at the end no process waits for another's last file
    items.sort(key=lambda item: not item.path.is_relative_to(TESTS / "integration"))
    for item in items:
        if any(item.path.is_relative_to(TESTS / each) for each in HEAVY):
            item.add_marker(pytest.mark.heavy)
        if item.get_closest_marker("gpu") and not GPU_DRIVER.exists():
            item.add_marker(pytest.mark.skip(reason="there is no NVIDIA GPU"))


def shared_memory_entries() -> set[str]:
    return {entry.name for entry in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()


def owned_by_others(name: str) -> bool:
    """Whether a living process maps the entry or has it open: other programs of this machine come and go."""
    path = str(SHARED_MEMORY / name)
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if path in (process / "maps").read_text():
                return True
            if any(path == str(fd.readlink()) for fd in (process / "fd").iterdir()):
                return True
    return False


@pytest.fixture(autouse=True)
def no_shared_memory_is_left() -> Iterator[None]:
    before = shared_memory_entries()
    yield
    left = shared_memory_entries() - before
    if left:
        time.sleep(0.2)  # another program may be between creating its entry and mapping it
        left = {name for name in left & shared_memory_entries() if not owned_by_others(name)}
    assert not left, f"left in /dev/shm: {sorted(left)}"


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Where the processes of all stacks come from: what they have in common is imported once."""
    with Forks(Modules.imported) as forks:
        yield forks
