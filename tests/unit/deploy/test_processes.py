"""One child process: heard, stopped, killed, and never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from deploy.local.forks import Forks
from deploy.local.processes import Announcement, Child, ChildFailedError
from shared.rpc.options import MALLOC_ENVIRONMENT

FAKE = "tests.unit.deploy.fake_worker"


def with_child(log_dir: Path, use: Callable[[Child], Awaitable[None]]) -> None:
    """Starts a fake decode worker, hands it to `use`, and stops it."""

    async def main() -> None:
        with Forks([]) as forks:
            child = await Child.start(forks, FAKE, "decode-0", ["--name", "decode-0"], log_dir=log_dir)
            try:
                await use(child)
            finally:
                await child.stop(grace_s=10)

    asyncio.run(main())


@pytest.mark.parametrize(
    "line",
    [b"", b"hello", b"{", b"[]", b"3", b"{}", b'{"event": "other"}', b'{"event": "listening", "name": "x"}', b"\xff"],
)
def test_other_output_is_no_announcement(line: bytes) -> None:
    assert Announcement.parse(line) is None


def test_a_child_says_where_it_listens_and_ends_with_0(tmp_path: Path) -> None:
    async def use(child: Child) -> None:
        (said,) = await child.announcements(60)
        assert (said.name, said.role, said.metrics_address) == ("decode-0", "decode", "127.0.0.1:1")
        assert int(said.address.rpartition(":")[2]) > 0
        assert os.getpgid(child.pid) == child.pid
        assert await child.stop(grace_s=10) == 0
        assert "a line that is no announcement" in child.log_tail()

    with_child(tmp_path, use)


def malloc_settings(pid: int) -> dict[str, str]:
    """What a process was started with."""
    entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if entry.startswith("MALLOC_"))


def test_a_child_has_the_allocator_s_settings_and_the_launcher_s_environment_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1234")

    async def use(child: Child) -> None:
        await child.announcements(60)
        assert malloc_settings(child.pid) == {**MALLOC_ENVIRONMENT, "MALLOC_TOP_PAD_": "1234"}

    with_child(tmp_path, use)


def test_a_child_that_crashes_shows_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_WORKER", "decode crashes")

    async def use(child: Child) -> None:
        with pytest.raises(
            ChildFailedError, match=r"decode-0 ended with exit code 3\n  decode-0 \| no such checkpoint"
        ):
            await child.announcements(60)
        assert await child.stop(grace_s=10) == 3

    with_child(tmp_path, use)


def test_a_mute_child_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_WORKER", "decode is mute")

    async def use(child: Child) -> None:
        with pytest.raises(ChildFailedError, match=r"did not listen within 0\.1 s"):
            await child.announcements(0.1)

    with_child(tmp_path, use)


def test_a_stubborn_child_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_WORKER", "decode does not stop")

    async def use(child: Child) -> None:
        await child.announcements(60)
        assert await child.stop(grace_s=0.1) == -signal.SIGKILL

    with_child(tmp_path, use)


def test_only_the_last_lines_of_a_log_are_shown(tmp_path: Path) -> None:
    async def use(child: Child) -> None:
        await child.announcements(60)
        child.log.write_text("".join(f"line {number}\n" for number in range(100)))
        shown = child.log_tail().splitlines()
        assert (len(shown), shown[-1]) == (20, "  decode-0 | line 99")

    with_child(tmp_path, use)
