"""The page of flags is what the code has: a changed flag changes it."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from decode_worker.config import DecodeConfig
from deploy.combined.config import CombinedConfig
from deploy.flags import BEGIN, END, LAUNCHER, PAGE, ROOT, SERVICES, with_flags
from shared.command_line import parse_config
from shared.flags import flags_of, grouped

VLLM = "| vLLM | here | what differs |"


def names(*configs: type) -> set[str]:
    return {flag.name for config in configs for flag in flags_of(config)}


def test_the_committed_page_is_what_the_code_has() -> None:
    page = PAGE.read_text()
    assert with_flags(page) == page, "run `make docs`"


@pytest.mark.parametrize("page", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_page_without_its_marks_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="needs one"):
        with_flags(page)


@pytest.mark.parametrize("config", SERVICES.values())
def test_every_flag_of_a_service_has_a_group_and_says_what_it_is(config: type) -> None:
    for group, flags in grouped(flags_of(config)):
        assert group is not None, flags
        for flag in flags:
            assert flag.help.endswith("."), flag.name


def test_a_launchers_flags_say_what_they_are() -> None:
    for flag in flags_of(*LAUNCHER.values()):
        assert flag.help.endswith("."), flag.name


def test_a_combined_worker_has_the_flags_of_both_and_where_the_second_listens() -> None:
    of_halves = names(SERVICES["python -m prefill_worker"], SERVICES["python -m decode_worker"])
    second = {"--decode-port", "--decode-metrics-port", "--decode-advertise"}
    assert names(CombinedConfig) == of_halves | second


def test_what_one_role_calls_a_flag_another_calls_the_same() -> None:
    """Of one name, one type in every service; a launcher's must be one that the workers have."""
    hints = {}
    for config in (*SERVICES.values(), *LAUNCHER.values()):
        for flag in flags_of(config):
            assert hints.setdefault(flag.name, flag.hint) == flag.hint, flag.name


def test_who_knows_vllm_is_told_of_flags_that_exist() -> None:
    page = PAGE.read_text()
    rows = page.partition(VLLM)[2].partition(BEGIN)[0].strip().splitlines()[1:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert len(cells) > 20
    assert all(len(row) == 3 for row in cells)
    known = names(*SERVICES.values()) | {"--config"}
    ours = {flag for _, here, differs in cells for flag in re.findall(r"`(--[a-z-]+)", f"{here} {differs}")}
    assert ours <= known
    same = {"--served-model-name", "--dtype", "--max-model-len", "--max-num-seqs", "--block-size", "--host", "--config"}
    assert same <= {theirs.strip("`") for theirs, here, _ in cells if theirs == here}


def test_the_text_names_flags_that_exist() -> None:
    text = PAGE.read_text().partition(VLLM)[0]
    named = set(re.findall(r"--[a-z][a-z-]+", text)) - {"--help", "--config", "--no-cascade"}
    assert named <= names(*SERVICES.values(), *LAUNCHER.values())


def test_the_example_of_a_file_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    (example,) = re.findall(r"<!-- decode.yaml -->\n```yaml\n(.*?)```", page, re.DOTALL)
    file = tmp_path / "decode.yaml"
    file.write_text(example)
    monkeypatch.setattr(sys, "argv", ["decode_worker", "--config", str(file)])
    of_file = parse_config(DecodeConfig, "")
    assert of_file.listen.advertised("0.0.0.0:1") == "node-1:50052"
    assert (of_file.max_num_seqs, of_file.max_model_len, of_file.allow_plaintext) == (128, 32768, True)
    flags = [f"--{key}" if value == "true" else f"--{key}={value}" for key, value in pairs(example)]
    monkeypatch.setattr(sys, "argv", ["decode_worker", *flags])
    assert parse_config(DecodeConfig, "") == of_file
    monkeypatch.setattr(sys, "argv", ["decode_worker", "--config", str(file), "--max-num-seqs", "7"])
    assert parse_config(DecodeConfig, "") == replace(of_file, max_num_seqs=7)


def pairs(example: str) -> list[tuple[str, str]]:
    return [(key, value) for key, _, value in (line.partition(": ") for line in example.splitlines())]
