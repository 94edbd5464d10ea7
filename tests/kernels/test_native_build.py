"""Building the native kernels: when, under which name, and what is said where it cannot be done."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shared.kernels.native import build as module
from shared.kernels.native.__main__ import main
from shared.kernels.native.build import build, library_path

ROOT = Path(__file__).parents[2]
COMPILER = """
import pathlib, sys
pathlib.Path("commands").open("a").write(" ".join(sys.argv[1:]) + "\\n")
pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_text("compiled")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation's folder with sources of its own."""
    (tmp_path / "slab_attention.c").write_text("int one;")
    (tmp_path / "vectors.h").write_text("int two;")
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    return tmp_path


@pytest.fixture
def compiler(tmp_path: Path) -> list[str]:
    """Writes down its commands, and the file that it is asked for."""
    script = tmp_path / "compiler.py"
    script.write_text(COMPILER)
    return [sys.executable, str(script)]


def libraries(folder: Path) -> list[Path]:
    return list(folder.glob("*.so"))


@pytest.mark.parametrize(("machine", "commands"), [("x86_64", 6), ("aarch64", 2)])
def test_every_instruction_set_is_compiled_into_one_library(
    folder: Path, compiler: list[str], monkeypatch: pytest.MonkeyPatch, machine: str, commands: int
) -> None:
    monkeypatch.setattr(module.platform, "machine", lambda: machine)
    assert libraries(folder) == []
    assert build(compiler) == library_path()
    assert library_path().read_text() == "compiled"
    assert len((folder / "commands").read_text().splitlines()) == commands
    assert "march=native" not in (folder / "commands").read_text()


def test_a_compiler_that_does_not_know_the_tiles_leaves_them_out(
    folder: Path, compiler: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    script = Path(compiler[1])
    script.write_text('import sys\nif "-mamx-tile" in sys.argv: sys.exit("unknown option")\n' + COMPILER)
    assert build(compiler).read_text() == "compiled"
    commands = (folder / "commands").read_text().splitlines()
    assert len(commands) == 4
    assert not any("statistics_rows" in command for command in commands)


def test_a_mistake_in_what_needs_the_tiles_is_no_missing_option(
    folder: Path, compiler: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    script = Path(compiler[1])
    script.write_text('import sys\nif "statistics_rows.c" in sys.argv: sys.exit("a mistake")\n' + COMPILER)
    with pytest.raises(subprocess.CalledProcessError):
        build(compiler)
    assert libraries(folder) == []


def test_it_is_built_once(folder: Path, compiler: list[str]) -> None:
    build(compiler)
    (folder / "commands").unlink()
    build(compiler)
    assert not (folder / "commands").exists()


@pytest.mark.parametrize("source", ["slab_attention.c", "vectors.h"])
def test_an_edited_source_has_another_library_and_the_old_one_goes(
    folder: Path, compiler: list[str], source: str
) -> None:
    before = build(compiler)
    (folder / source).write_text("int three;")
    assert not library_path().exists()
    after = build(compiler)
    assert after != before
    assert libraries(folder) == [after]


def test_machines_share_no_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for machine in ("x86_64", "aarch64"):
        monkeypatch.setattr(module.platform, "machine", lambda machine=machine: machine)
        names.add(library_path().name)
    assert len(names) == 2


@pytest.mark.parametrize("command", ["there-is-no-such-compiler", f"{sys.executable} -c 'import sys; sys.exit(3)'"])
def test_without_a_working_compiler_one_line_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setenv("CC", command)
    main()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert said[0].startswith("native kernels: none, the service runs on torch alone: ")
    assert sorted(path.name for path in folder.iterdir()) == ["slab_attention.c", "vectors.h"]


def test_a_refusal_is_quoted(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CC", f"""{sys.executable} -c 'import sys; sys.exit("a note\\nx.c:1: error: no\\nmore")'""")
    main()
    assert capsys.readouterr().out.endswith(": x.c:1: error: no\n")


@pytest.mark.skipif(shutil.which(os.environ.get("CC") or "cc") is None, reason="no C compiler")
def test_the_command_builds_what_the_service_loads() -> None:
    command = [sys.executable, "-W", "error", "-m", "shared.kernels.native"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == f"native kernels: {library_path().name}\n"
    assert library_path().exists()
