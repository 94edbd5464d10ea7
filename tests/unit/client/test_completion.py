"""Shells complete commands, options and files; bash is really asked."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from vlcache.cli import COMMANDS, main
from vlcache.cli.completion import SHELLS

BIN = Path(sys.executable).parent
# What bash does when tab is pressed at the end of a line.
PRESS_TAB = """
eval "$(vlcache completion bash)"
COMP_LINE="$1" COMP_POINT=${#1} COMP_TYPE=9
words=($1)
[[ "$1" == *" " ]] && words+=("")
function=$(complete -p vlcache | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$function vlcache "${words[-1]}" ""
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completed(line, folder="."):
    """What bash offers, without the blanks that end a word."""
    command = ["bash", "--norc", "-c", PRESS_TAB, "bash", line]
    environment = {"PATH": f"{BIN}:/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return [word.strip() for word in done.stdout.splitlines()]


def test_bash_completes_commands_and_options():
    assert completed("vlcache be") == ["bench"]
    names = {command.__name__.rpartition(".")[2] for command in COMMANDS}
    assert names <= set(completed("vlcache "))
    assert completed("vlcache ask --max-new") == ["--max-new-tokens"]
    assert set(SHELLS) <= set(completed("vlcache completion "))


def test_bash_completes_files(tmp_path):
    (tmp_path / "photo.jpg").touch()
    assert completed("vlcache ask --image pho", tmp_path) == ["photo.jpg"]


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_accepts_its_script(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "vlcache" in script
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_argcomplete_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'vlcache[cli]'" in capsys.readouterr().err
