"""The fork server: processes that are what `python -m` would have made of them, and end with their launcher."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from deploy.local.forks import ROOT, ForkedProcess, Forks

PATIENCE_S = 60.0
# The module says what it was run as, then does what its flag says.
PROGRAM = """
import atexit, os, signal, sys
import {package}.heavy

if __name__ == "__main__":
    shown = open("/proc/self/comm").read().strip()
    print(sys.argv, __name__, {package}.heavy.IMPORTED_BY, os.getpid() == os.getsid(0), shown, flush=True)
    atexit.register(print, "the end")
    exec(sys.argv[1])
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that can be run, and knows which process has imported the rest of it."""
    folder = tmp_path / "heavyweight"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "heavy.py").write_text("import os\nIMPORTED_BY = os.getpid()\n")
    (folder / "__main__.py").write_text(PROGRAM.format(package=folder.name))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'client' / 'src'}:{tmp_path}")
    return folder.name


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


async def output_of(process: ForkedProcess) -> list[str]:
    return [line.decode().rstrip() async for line in process.output]


def has_ended(pidfd: int) -> bool:
    # readable means ended
    return select.select([pidfd], [], [], PATIENCE_S)[0] == [pidfd]


@pytest.mark.parametrize("imported", [True, False])
def test_a_process_is_what_python_would_have_made_of_it(package: str, imported: bool, tmp_path: Path) -> None:
    async def main() -> None:
        with Forks([package] if imported else []) as forks:
            process = await forks.start(package, ["pass", "--more"], log=tmp_path / "log")
            said, end = await output_of(process)
            argv, name, imported_by, leads_its_session, shown = words_of(said)
            assert (argv[1:], name, leads_its_session, end) == (["pass", "--more"], "__main__", True, "the end")
            assert (imported_by == process.pid) is not imported
            assert shown == (package if imported else Path(sys.executable).name)
            assert await process.wait() == process.returncode == 0
        assert (tmp_path / "log").read_text() == ""

    run(main)


def words_of(said: str) -> tuple[list[str], str, int, bool, str]:
    argv, _, rest = said[1:].partition("] ")
    name, pid, leads, shown = rest.split()
    return [word.strip("'") for word in argv.split(", ")], name, int(pid), leads == "True", shown


@pytest.mark.parametrize("imported", [True, False])
@pytest.mark.parametrize(
    ("program", "code", "log"),
    [
        ("sys.exit(3)", 3, ""),
        ("raise ValueError('no such checkpoint')", 1, "ValueError: no such checkpoint"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
    ],
)
def test_its_end_is_reported(package: str, imported: bool, program: str, code: int, log: str, tmp_path: Path) -> None:
    async def main() -> None:
        with Forks([package] if imported else []) as forks:
            process = await forks.start(package, [program], log=tmp_path / "log")
            await output_of(process)
            assert await process.wait() == process.returncode == code
        assert log in (tmp_path / "log").read_text()

    run(main)


def test_what_cannot_be_imported_fails_where_it_is_needed(package: str, tmp_path: Path) -> None:
    (tmp_path / package / "heavy.py").write_text("raise RuntimeError('broken')")

    async def main() -> None:
        with Forks([package]) as forks:
            process = await forks.start(package, ["pass"], log=tmp_path / "log")
            assert (await output_of(process), await process.wait()) == ([], 1)
        assert "RuntimeError: broken" in (tmp_path / "log").read_text()

    run(main)


def test_several_run_at_once_and_each_has_a_report_of_its_own(package: str, tmp_path: Path) -> None:
    async def main() -> None:
        with Forks([package]) as forks:
            started = [forks.start(package, [f"sys.exit({code})"], log=tmp_path / f"{code}") for code in range(20)]
            processes = await asyncio.gather(*started)
            assert await asyncio.gather(*(process.wait() for process in processes)) == list(range(20))
            for process in processes:
                await output_of(process)

    run(main)


def test_event_loops_of_several_threads_share_it(package: str, tmp_path: Path) -> None:
    async def one(forks: Forks, code: int) -> int:
        process = await forks.start(package, [f"sys.exit({code})"], log=tmp_path / f"{code}")
        await output_of(process)
        return await process.wait()

    async def main() -> None:
        with Forks([package]) as forks:
            runs = (asyncio.to_thread(asyncio.run, one(forks, code)) for code in range(4))
            assert await asyncio.gather(*runs) == [0, 1, 2, 3]

    run(main)


def test_leaving_it_ends_its_processes(package: str, tmp_path: Path) -> None:
    async def main() -> None:
        with contextlib.ExitStack() as exits:
            with Forks([package]) as forks:
                process = await forks.start(package, ["signal.pause()"], log=tmp_path / "log")
                exits.callback(os.close, pidfd := os.pidfd_open(process.pid))
                assert process.returncode is None
            assert has_ended(pidfd)
            assert await process.wait() == -signal.SIGKILL
            await output_of(process)

    run(main)


def test_a_server_that_dies_takes_its_processes_along_and_starts_no_more(package: str, tmp_path: Path) -> None:
    async def main() -> None:
        with Forks([package]) as forks:
            process = await forks.start(package, ["signal.pause()"], log=tmp_path / "log")
            forks._server.kill()
            assert await process.wait() == -signal.SIGKILL
            await output_of(process)
            with pytest.raises(OSError, match=r"ended|Broken pipe|reset"):
                await forks.start(package, ["pass"], log=tmp_path / "log")

    run(main)


def test_nothing_outlives_a_launcher_that_is_killed(package: str, tmp_path: Path) -> None:
    launcher = f"""
import asyncio
from pathlib import Path
from deploy.local.forks import Forks

async def main():
    with Forks([{package!r}]) as forks:
        process = await forks.start({package!r}, ["signal.pause()"], log=Path({str(tmp_path / "log")!r}))
        print(process.pid, forks._server.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""
    command = [sys.executable, "-c", launcher]
    with (
        contextlib.ExitStack() as exits,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        pidfds = [os.pidfd_open(int(pid)) for pid in process.stdout.readline().split()]
        for pidfd in pidfds:
            exits.callback(os.close, pidfd)
        assert select.select(pidfds, [], [], 0)[0] == []
        process.kill()
        assert all(has_ended(pidfd) for pidfd in pidfds)


def test_beside_a_gpu_every_process_starts_afresh(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.local.forks.GPU_DRIVER", tmp_path)

    async def main() -> None:
        with Forks([package]) as forks:
            process = await forks.start(package, ["pass"], log=tmp_path / "log")
            said, _ = await output_of(process)
            assert words_of(said)[2] == process.pid
            assert await process.wait() == 0

    run(main)
