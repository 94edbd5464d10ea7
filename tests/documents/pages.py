"""What stands in the documents: their blocks, their commands and their links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "client/README.md",
    "benchmarks/README.md",
    "models/shapes_vlm/checkpoint/README.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
)
"""Those whose commands are meant for whoever reads them now; pages of results and the change log tell of the past."""

# What a command begins with. A block without a language that begins with none of these must say what it is.
PROGRAMS = [
    "make",
    "vlcache",
    "python",
    "python3",
    "pip",
    "git",
    "cd",
    "curl",
    "source",
    "kubectl",
    "docker",
    "podman",
    "apt",
    "promtool",
    "guidellm",
    "vllm",
    "echo",
    "export",
    "eval",
    "sudo",
    ".venv/bin/python",
    ".venv/bin/vlcache",
]
# Blocks without a language that are no commands: figures, formulas, and what a program prints.
LISTINGS = (
    "vlcache (client/src)",
    "client ──Generate──▶",
    '{"event": "listening"',
    "(a span of the client's program)",
    "2026-11-22 02:07:19,582 router",
    "--total-queued-requests-metric",
    '"kv": {"full_bytes"',
    '"kept": {"num_kv_heads"',
    "dropped = mean over layers",
    # a program of which the reader writes the rest
    "from vlcache import Client, Tls",
)
# Of a code span the first word and one more: `make` alone is a word, and so is `python`.
_IN_A_SPAN = re.compile(rf"(?:{'|'.join(map(re.escape, PROGRAMS))}) \S")
_FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=\n\n)((?: {4}\S[^\n]*\n)+)")
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_NAMED = re.compile(r"<!-- (\S+\.\w+) -->\n```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_ENVIRONMENT = re.compile(r"^(?:[A-Z_]+=(?:\$\([^)]*\)|\S*) )+")
# What is said behind a command, and may tell another one.
_COMMENT = re.compile(r"\s+# +(?:(?:or: |(?=vlcache ))(?P<command>\S+ .*)|.*)$")
_CONTINUED = re.compile(r"\s*\\\n\s*")
_SUBSTITUTED = re.compile(r"\$\((vlcache [^()]*?)(?: 2>>\S+)?\)")
_FLAGS_OF_THE_ROW_ABOVE = re.compile(r"\| same, `(--[^`]*)`")


@dataclass(frozen=True)
class Block:
    """A fenced block, or an indented one, whose `language` is empty."""

    page: str
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        """Where it stands."""
        return f"{self.page}:{self.line}"

    @property
    def is_listing(self) -> bool:
        """Whether it is known to be no commands."""
        return not self.language and self.text.lstrip().startswith(LISTINGS)

    @property
    def is_shell(self) -> bool:
        """Whether it has commands: it says so, or says nothing and begins with one."""
        if self.is_listing:
            return False
        first = _ENVIRONMENT.sub("", self.text.strip()).split(maxsplit=1)[0]
        return self.language in ("sh", "bash") or (not self.language and first in PROGRAMS)


@dataclass(frozen=True)
class Command:
    """One command line, without the variables before it and what is done with its output.

    `whole` says that it stands in a block, to be copied; one within a sentence may leave out what it needs.
    """

    page: str
    line: int
    text: str
    whole: bool

    @property
    def name(self) -> str:
        """Where it stands, and what it is."""
        return f"{self.page}:{self.line} {self.text}"

    @property
    def words(self) -> list[str]:
        """As a shell splits them, comments left out."""
        words = shlex.split(self.text, comments=True)
        return words[:-1] if words[-1] == "&" else words


def text_of(page: str) -> str:
    """The page's source."""
    return (ROOT / page).read_text()


def blocks(page: str) -> list[Block]:
    """All blocks of code."""
    text = text_of(page)
    fenced = [Block(page, _line(text, match), match[2].strip(), match[3]) for match in _FENCE.finditer(text)]
    indented = [Block(page, _line(text, match), "", match[1]) for match in _INDENTED.finditer(without_blocks(text))]
    return fenced + indented


def named_files(text: str) -> dict[str, str]:
    """Files that a page shows, by name: blocks behind a comment that is a name."""
    return {match[1]: match[2] for match in _NAMED.finditer(text)}


def without_blocks(text: str) -> str:
    """The same lines, those of fenced blocks empty."""
    return _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)


def commands(page: str) -> list[Command]:
    """Every command of a page, in blocks and within sentences and tables."""
    found = [command for block in blocks(page) if block.is_shell for command in _of_block(block)]
    return found + list(_of_spans(page))


def all_commands() -> list[Command]:
    """Every command of every page."""
    return [command for page in PAGES for command in commands(page)]


def _of_block(block: Block) -> Iterator[Command]:
    line = block.line + 1
    for logical in re.split(r"(?<!\\)\n", block.text.rstrip("\n")):
        yield from _of_line(block.page, line, logical, whole=True)
        line += logical.count("\n") + 1


def _of_spans(page: str) -> Iterator[Command]:
    text = without_blocks(text_of(page))
    above = ""
    for match in re.finditer(rf"{_SPAN.pattern}|{_FLAGS_OF_THE_ROW_ABOVE.pattern}", text):
        span = " ".join((match[1] or match[2]).split())
        if match[2]:
            yield Command(page, _line(text, match), f"{above} {span}", whole=False)
        elif _IN_A_SPAN.match(_ENVIRONMENT.sub("", span)) and " <- " not in span:
            yield from _of_line(page, _line(text, match), span, whole=False)
            above = span


def _of_line(page: str, line: int, text: str, *, whole: bool) -> Iterator[Command]:
    """The commands of one line of a shell: those joined by `&&`, and those whose output is taken."""
    joined = _CONTINUED.sub(" ", text).strip()
    said = _COMMENT.search(joined)
    if said and said["command"]:
        yield Command(page, line, said["command"], whole=True)
    joined = _COMMENT.sub("", joined)
    for part in joined.split(" && "):
        if stripped := _ENVIRONMENT.sub("", part.strip()):
            yield Command(page, line, stripped, whole)
    for substituted in _SUBSTITUTED.findall(joined):
        yield Command(page, line, substituted, whole)


def _line(text: str, match: re.Match[str]) -> int:
    return text.count("\n", 0, match.start()) + 1
