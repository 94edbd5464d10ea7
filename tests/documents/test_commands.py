"""Every command of the documents is one: somebody runs it, and what it is made of exists. Nothing is started here."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tests.documents.covered import BENCHMARKS, RULES, Rule, names_a_test, rule_of
from tests.documents.pages import LISTINGS, PAGES, ROOT, Block, Command, all_commands, blocks, commands, named_files
from tests.documents.programs import complaint, has_parser, module_file, unknown_flags
from tests.documents.stand_ins import filled_in, lay_out

COMMANDS = all_commands()
OURS = re.compile(r"vlcache |(\.venv/bin/)?python -m (?!lmms_eval)")
# Of what a sentence mentions, what it leaves out is no mistake.
INCOMPLETE = re.compile(r"arguments are required|Required options|Missing from")
# What `make` starts that is no program of ours, or takes no arguments.
OF_OTHERS = ("pip", "venv", "pytest", "mypy", "grpc_tools.protoc")


def named(commands: Sequence[Command]) -> list[pytest.param]:
    """Each text once: a page that repeats another one's command needs no second look, unless it is to be copied."""
    by_text = {(command.text, command.whole): command for command in reversed(commands)}
    return [pytest.param(command, id=command.name) for command in reversed(by_text.values())]


def that_begin(*programs: str) -> list[pytest.param]:
    return named([command for command in COMMANDS if command.text.startswith(programs)])


def flags_of(words: list[str], flag: str) -> list[str]:
    """The values of a flag that may be given several times."""
    return [value for name, value in itertools.pairwise(words) if name == flag]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str) -> None:
    unknown = [each.name for each in blocks(page) if not (each.language or each.is_shell or each.is_listing)]
    assert not unknown, "a block needs a language, or begins with a program of pages.py"


def test_every_listing_is_one() -> None:
    texts = [each.text.lstrip() for page in PAGES for each in blocks(page) if each.is_listing]
    assert [start for start in LISTINGS if not any(text.startswith(start) for text in texts)] == []


def test_commands_are_found_wherever_they_stand() -> None:
    found = {(command.page, command.text, command.whole) for command in COMMANDS}
    assert ("README.md", "vlcache status", True) in found
    assert ("README.md", "python -m benchmarks.capacity", False) in found
    # behind a variable, behind "same", continued, joined, in a comment, and within another one
    assert ("docs/kubernetes.md", 'vlcache ask --image a.png "What is it?"', True) in found
    assert ("README.md", "docker compose --profile cpu up --build", False) in found
    same = "python -m benchmarks.decode_step --rounds 16 --hidden 4096 --layers 3 --kv-heads 32"
    assert ("README.md", same, False) in found
    assert ("docs/openai.md", "--model", True) not in found
    assert ("docs/security.md", "vlcache token team-a", True) in found
    assert "compare_kvpress.py" in " ".join(command.text for command in commands("benchmarks/README.md"))


def test_somebody_takes_care_of_every_command() -> None:
    nobodys = [command.name for command in COMMANDS if rule_of(command) is None]
    assert not nobodys, "who runs it? covered.py has the answers"


def test_a_block_behind_a_name_is_a_file() -> None:
    page = "with\n\n<!-- a.yaml -->\n```yaml\nport: 1\n```\n<!-- no file -->\n```\nx\n```\n"
    assert named_files(page) == {"a.yaml": "port: 1\n"}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.pattern)
def test_every_rule_has_a_command_and_tests(rule: Rule) -> None:
    assert any(rule_of(command) is rule for command in COMMANDS)
    assert names_a_test(ROOT / rule.by)


@pytest.mark.parametrize("command", named([each for each in COMMANDS if OURS.match(each.text)]))
def test_our_programs_take_their_flags(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = Command(command.page, command.line, filled_in(command.text), command.whole).words
    if words[0] != "vlcache":
        words[0] = "python"
        assert module_file(words[2]) is not None
    if words[0] == "python" and not has_parser(words[2]):
        assert words[3:] == []
        return
    assert unknown_flags(words) == set()
    if rule_of(command).by.endswith("test_security_page.py") or "…" in command.text:
        return  # names files that are made there, or are the reader's
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    wrong = complaint(words)
    assert not wrong or (not command.whole and INCOMPLETE.search(wrong)), wrong


@pytest.mark.parametrize(
    "wrong",
    [
        "vlcache ask --imagine a.png what",
        "vlcache asks",
        "python -m router --registri x",
        "python -m benchmarks.wire 3",
    ],
)
def test_a_wrong_command_is_found_out(wrong: str) -> None:
    said = complaint(wrong.split())
    assert unknown_flags(wrong.split()) or (said and not INCOMPLETE.search(said))


@pytest.mark.parametrize("command", that_begin("make "))
def test_targets_of_make_exist_and_start_what_takes_their_flags(command: Command) -> None:
    arguments = command.words[1:]
    makefile = (ROOT / "Makefile").read_text()
    for argument in arguments:
        name, is_variable, value = argument.partition("=")
        assert not is_variable or re.search(rf"\$\(.*\b{name}\b", makefile)
        assert name != "TESTS" or (ROOT / value).exists()
    # what setup does is not looked at: it need not be due
    dry = ["make", "--dry-run", "--old-file", "setup", *arguments]
    done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for module, flags in re.findall(r"python -m ([\w.]+)((?: [^\s;|&]+)*)", re.sub(r"\s*\\\n\s*", " ", done.stdout)):
        if module not in OF_OTHERS and has_parser(module):
            assert complaint(["python", "-m", module, *flags.split()]) == ""


def test_every_target_of_make_is_explained() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):.*##", makefile, re.MULTILINE))
    told = {command.words[1] for command in COMMANDS if command.words[0] == "make"}
    # `make help` is what lists the others
    assert targets - told <= {"help", "prometheus", "clean"}


@pytest.mark.parametrize("command", that_begin("docker compose", "docker build"))
def test_docker_is_told_of_what_there_is(command: Command) -> None:
    words = command.words
    files = flags_of(words, "-f")
    assert [file for file in files if not (ROOT / file).is_file()] == []
    if words[1] == "build":
        stages = re.findall(r"^FROM .* AS (\w+)", (ROOT / files[0]).read_text(), re.MULTILINE)
        assert set(flags_of(words, "--target")) <= set(stages)
        return
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    profiles = {profile for service in services.values() for profile in service.get("profiles", ())}
    assert set(flags_of(words, "--profile")) <= profiles
    assert {scaled.partition("=")[0] for scaled in flags_of(words, "--scale")} <= set(services)
    subcommand = next(word for word in words[2:] if word in ("up", "down", "stop", "restart"))
    operands = [word for word in words[words.index(subcommand) + 1 :] if "-" not in word and "=" not in word]
    assert set(operands) - {"SERVICE"} <= set(services)


@pytest.mark.parametrize("command", that_begin("kubectl "))
def test_kubectl_is_told_of_what_there_is(command: Command) -> None:
    for folder in flags_of(command.words, "-k"):
        assert (ROOT / folder / "kustomization.yaml").is_file()
    base = "".join(file.read_text() for file in (ROOT / "deploy/kubernetes/base").rglob("*.yaml"))
    names = {
        document["metadata"]["name"] for document in yaml.safe_load_all(base) if document and "metadata" in document
    }
    asked = {word.partition("/")[2] for word in command.words if word.startswith(("deployment/", "service/"))}
    assert asked <= names


@pytest.mark.parametrize("command", that_begin("pip install"))
def test_extras_exist(command: Command) -> None:
    for target in (word for word in command.words[2:] if not word.startswith("-")):
        name, _, extras = target.rstrip("]").partition("[")
        projects = {".": "pyproject.toml", "client": "client/pyproject.toml", "vlcache": "client/pyproject.toml"}
        assert name in {*projects, "guidellm"}, "whose package is it?"
        if extras and name in projects:
            _, _, optional = (ROOT / projects[name]).read_text().partition("[project.optional-dependencies]")
            known = set(re.findall(r"^(\w+) = \[", optional.partition("\n[")[0], re.MULTILINE))
            assert set(extras.split(",")) <= known


@pytest.mark.parametrize("command", that_begin("promtool"))
def test_files_of_other_programs_exist(command: Command) -> None:
    files = [word for word in command.words if "/" in word]
    assert files
    assert [file for file in files if not (ROOT / file).exists()] == []


BENCHES = {each.words[2] for each in COMMANDS if (rule := rule_of(each)) is not None and rule.by == BENCHMARKS}


@pytest.mark.parametrize("module", sorted(BENCHES))
def test_every_benchmark_is_run_with_the_least(module: str) -> None:
    parent, _, name = module.rpartition(".")
    imports = re.compile(rf"from {re.escape(module)}(\.__main__)? import|from {re.escape(parent)} import .*\b{name}\b")
    tests = [file.read_text() for file in (ROOT / BENCHMARKS).glob("test_*.py")]
    assert any(imports.search(test) and re.search(r"\bmain\(", test) for test in tests)


def snippets() -> list[pytest.param]:
    found = [each for page in PAGES for each in blocks(page) if each.language == "python"]
    return [pytest.param(each, id=each.name) for each in found]


@pytest.mark.parametrize("block", snippets())
def test_python_is_python(block: Block) -> None:
    assert ast.parse(block.text).body


@pytest.mark.parametrize("module", ["prefill_worker.compression.catalogue", "deploy.kubernetes", "nowhere"])
def test_what_has_no_parser_is_not_run(module: str) -> None:
    assert not has_parser(module)
    with pytest.raises(AssertionError, match="no parser"):
        complaint(["python", "-m", module])
