"""Command line and file become a checked configuration, or a sentence and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from shared.command_line import parse_config
from shared.flags import LIMITS, NETWORK


@dataclass(frozen=True, kw_only=True)
class Example:
    """An example."""

    port: Annotated[int, NETWORK]
    """Where."""
    share: Annotated[float, LIMITS] = 0.1
    """A share,
    of two lines."""
    most: Annotated[int | None, LIMITS] = None
    """Most of it."""
    dtype: Literal["auto", "float32"] = "auto"
    """A precision."""
    folder: Path = Path("/here")
    """A folder."""
    hosts: tuple[str, ...] = ()
    """Some names."""
    verbose: bool = False
    """Say more."""

    def __post_init__(self) -> None:
        if self.share > 1:
            raise ValueError(f"share must be at most 1, not {self.share}")


Parse = Callable[..., Example]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    def read(*arguments: str | Path) -> Example:
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setattr(sys, "argv", ["example", *map(str, arguments)])
        return parse_config(Example, "An example service.")

    return read


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        (tmp_path / "flags.yaml").write_text(text)
        return tmp_path / "flags.yaml"

    return write


def refusal(parse: Parse, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    return printed.out + printed.err


def test_flags_fill_the_configuration(parse: Parse) -> None:
    parsed = parse("--port", "5000", "--share=0.5", "--verbose", "--hosts", "a", "b", "--most", "3")
    assert parsed == Example(port=5000, share=0.5, verbose=True, hosts=("a", "b"), most=3)
    assert parse("--port", "1") == Example(port=1)


@pytest.mark.parametrize("spelt", ["--no-verbose", "--verbose --no-verbose"])
def test_a_switch_has_an_opposite(parse: Parse, written: Callable[[str], Path], spelt: str) -> None:
    file = written("port: 1\nverbose: true\n")
    assert parse("--config", file).verbose
    assert not parse("--config", file, *spelt.split()).verbose


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--port", "x"),
        ("--port", "1", "--share", "2"),
        ("--port", "1", "--no-such-flag", "1"),
        ("--port", "1", "--verbose", "True"),
        ("--port", "1", "--dtype", "fp32"),
        ("--port", "1", "--config"),
        ("--port", "1", "--config", "/no/such/file.yaml"),
    ],
)
def test_a_bad_command_line_ends_the_process_with_code_2(
    parse: Parse, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert refusal(parse, capsys, *arguments)


def test_an_impossible_value_is_explained(parse: Parse, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(parse, capsys, "--port", "1", "--share", "2")
    assert said == "configuration error: share must be at most 1, not 2.0\n"


def test_help_shows_every_flag_in_its_group(parse: Parse, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "limit options" in text
    assert LIMITS.says in text
    for shown in (
        "--config FILE",
        "--port PORT",
        "(required)",
        "--share NUMBER",
        "A share, of two lines. (default: 0.1)",
        "--most N",
        "(default: none)",
        "--dtype {auto,float32}",
        "--folder PATH",
        "--verbose, --no-verbose",
    ):
        assert shown in text


def test_a_file_gives_what_the_command_line_does_not(parse: Parse, written: Callable[[str], Path]) -> None:
    file = written("port: 7\nshare: 1\nmost: 3\ndtype: float32\nfolder: there\nhosts: [a, b]\nverbose: true\n")
    of_file = Example(port=7, share=1.0, most=3, dtype="float32", folder=Path("there"), hosts=("a", "b"), verbose=True)
    assert parse("--config", file) == of_file
    assert type(parse("--config", file).share) is float
    assert parse(f"--config={file}", "--port", "8").port == 8
    assert parse("--share", "0.2", "--config", file).share == 0.2


def test_names_are_those_of_the_command_line_and_fields(
    monkeypatch: pytest.MonkeyPatch, written: Callable[[str], Path]
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Long:
        max_num_seqs: int = 1
        """Many."""

    for spelt in ("max-num-seqs", "max_num_seqs"):
        monkeypatch.setattr(sys, "argv", ["example", "--config", str(written(f"{spelt}: 32"))])
        assert parse_config(Long, "").max_num_seqs == 32


def test_help_shows_what_the_file_says(
    parse: Parse, written: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse("--config", written("port: 4711"), "--help")
    assert "(default: 4711)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- port\n", "flags are a mapping"),
        ("", "flags are a mapping"),
        ("text", "flags are a mapping"),
        ("port: [", "cannot be read"),
        ("port: 1\n---\nport: 2\n", "cannot be read"),
        ("a: &a [*a]\n", "cannot be read"),
        ("prot: 1\n", "there is no flag 'prot'"),
        ("--port: 1\n", "there is no flag '--port'"),
        ("config: other.yaml\n", "there is no flag 'config'"),
        ("listen: {port: 1}\n", "there is no flag 'listen'"),
        ("1: 2\n", "there is no flag 1"),
        ("port: 1\nport: 2\n", "port stands there twice"),
        ("port: '1'\n", "port must be a whole number, not '1'"),
        ("port: true\n", "port must be a whole number, not True"),
        ("port: 1.5\n", "port must be a whole number, not 1.5"),
        ("port: null\n", "port must be a whole number, not None"),
        ("port: {a: 1}\n", "port must be a whole number, not {'a': 1}"),
        ("share: much\n", "share must be a number, not 'much'"),
        ("share: false\n", "share must be a number, not False"),
        ("most: few\n", "most must be a whole number or null, not 'few'"),
        ("dtype: fp32\n", "dtype must be one of auto, float32, not 'fp32'"),
        ("dtype: [auto]\n", "dtype must be one of auto, float32, not ['auto']"),
        ("folder: 1\n", "folder must be a path, not 1"),
        ("hosts: a\n", "hosts must be a list, each entry a text"),
        ("hosts: [a, 1]\n", "hosts must be a text"),
        ("verbose: 1\n", "verbose must be true or false, not 1"),
        ("verbose: 'yes'\n", "verbose must be true or false, not 'yes'"),
        ("port: 1\nshare: 2\n", "share must be at most 1, not 2.0"),
        ("port: !!python/object/apply:os.getpid []\n", "cannot be read"),
    ],
)
def test_a_bad_file_is_one_sentence(
    parse: Parse, written: Callable[[str], Path], capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    printed = refusal(parse, capsys, "--config", written(text))
    assert printed.startswith("configuration error: ")
    assert said in printed
    assert printed.count("\n") == 1


def test_a_file_that_cannot_be_read_is_one_sentence(
    parse: Parse, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin").write_bytes(b"name: caf\xe9\n")
    for path in (tmp_path, tmp_path / "missing.yaml", tmp_path / "latin"):
        printed = refusal(parse, capsys, "--config", path)
        assert str(path) in printed
        assert "cannot be read" in printed
        assert printed.count("\n") == 1
