"""The commands of docs/security.md: those of the client run, and those of the services are what the services take."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from vlcache.cli import main

from decode_worker.config import DecodeConfig
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig
from shared.command_line import parse_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()
SERVICES = {"prefill_worker": PrefillConfig, "decode_worker": DecodeConfig, "router": RouterConfig}


def commands() -> list[str]:
    (block,) = re.findall(r"<!-- commands: .* -->\n```\n(.*?)```", PAGE, re.DOTALL)
    return block.splitlines()


def test_the_commands_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    certs, token, *services, ask = commands()
    assert main(shlex.split(certs)[1:]) == 0
    capsys.readouterr()
    (line,) = re.findall(r"export VLCACHE_TOKEN=\$\(vlcache (.*) 2>>tokens.txt\)", token)
    assert main(shlex.split(line)) == 0
    printed = capsys.readouterr()
    monkeypatch.setenv("VLCACHE_TOKEN", printed.out.strip())
    Path("tokens.txt").write_text(printed.err)
    for service in services:
        python, _, module, *flags = shlex.split(service.removesuffix(" &"))
        assert python == "python"
        monkeypatch.setattr(sys, "argv", [module, *flags])
        assert parse_config(SERVICES[module], module).identity() is not None
    words = shlex.split(ask)
    words[words.index("--image") + 1] = str(ROOT / words[words.index("--image") + 1])
    # nobody listens there: what is wrong with the command would be said first
    assert main([*words[1:], "--address", "127.0.0.1:1", "--timeout", "1"]) == 1


def test_every_flag_of_the_page_is_one() -> None:
    known = set()
    for config in SERVICES.values():
        known |= {"--" + name.replace("_", "-") for name in config.__dataclass_fields__}
    of_others = {
        "--host",
        "--port",
        "--hosts",
        "--ca-file",
        "--image",
        "--profile",
        "--build",
        "--detach",
    }
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z.-]*[a-z]", PAGE))
    assert {"--tls-cert", "--api-tokens", "--demand-client-cert", "--allow-plaintext"} <= mentioned
    assert mentioned - of_others <= known
