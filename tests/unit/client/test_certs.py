"""`vlcache certs` and `vlcache token`: what they write is what services take."""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from vlcache.certs.authority import DEFAULT_HOSTS, LEAVES
from vlcache.cli import main

from router.admission.api_tokens import ApiTokens
from shared.rpc.identity import Identity, TlsFiles


def files(folder: Path, name: str) -> TlsFiles:
    return TlsFiles(cert=folder / f"{name}.pem", key=folder / f"{name}.key", ca=folder / "ca.pem")


def names_in(file: Path) -> list[tuple[str, str]]:
    # what the ssl module tells of a file is not documented, and the same as of a peer
    return list(ssl._ssl._test_decode_cert(str(file))["subjectAltName"])


def test_every_role_has_a_certificate_that_its_service_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "certs"
    assert main(["certs", str(folder)]) == 0
    assert {Path(line) for line in capsys.readouterr().out.split()} | {folder / "ca.key"} == set(folder.iterdir())
    for name, roles in LEAVES.items():
        assert Identity(files(folder, name), roles).current().roles == set(roles)
        names = names_in(folder / f"{name}.pem")
        assert [value for kind, value in names if kind != "URI"] == [*DEFAULT_HOSTS[:2], "0:0:0:0:0:0:0:1"]


def test_keys_are_for_their_owner_only(tmp_path: Path) -> None:
    main(["certs", str(tmp_path)])
    modes = {file.suffix: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == {".key": 0o600, ".pem": 0o644}


def test_called_again_it_renews_all_but_the_ca(tmp_path: Path) -> None:
    main(["certs", str(tmp_path)])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert main(["certs", str(tmp_path), "--hosts", "node-1", "10.0.0.7", "--days", "3"]) == 0
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert {name for name in before if before[name] == after[name]} == {"ca.pem", "ca.key"}
    Identity(files(tmp_path, "decode"), ["decode"])
    assert ("DNS", "node-1") in names_in(tmp_path / "decode.pem")
    assert ("IP Address", "10.0.0.7") in names_in(tmp_path / "decode.pem")


@pytest.mark.parametrize("options", [("--days", "0"), ("--days", "-1")])
def test_impossible_options_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    assert main(["certs", str(tmp_path / "new"), *options]) == 2
    assert "--days must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_without_cryptography_it_says_what_to_install(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['cryptography'] = None\nfrom vlcache.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "certs", str(tmp_path / "new")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "pip install 'vlcache[certs]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_token_and_its_line_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = []
    for _ in range(2):
        assert main(["token", "team-a"]) == 0
        printed = capsys.readouterr()
        (tmp_path / "tokens.txt").write_text(printed.err)
        tokens.append(printed.out.strip())
        assert re.fullmatch(r"[A-Za-z0-9_-]{43}", tokens[-1])
        assert tokens[-1] not in printed.err
        assert ApiTokens(tmp_path / "tokens.txt").tenant_of(tokens[-1]) == "team-a"
    assert tokens[0] != tokens[1]


def test_json_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certs", str(tmp_path / "new"), "--json"]) == 0
    files = [Path(file) for file in json.loads(capsys.readouterr().out)["files"]]
    assert {*files, tmp_path / "new" / "ca.key"} == set((tmp_path / "new").iterdir())
    assert main(["token", "team-a", "--json"]) == 0
    printed = capsys.readouterr()
    made = json.loads(printed.out)
    (tmp_path / "tokens.txt").write_text(made["line"] + "\n")
    assert (made["tenant"], printed.err) == ("team-a", "")
    assert ApiTokens(tmp_path / "tokens.txt").tenant_of(made["token"]) == "team-a"


def test_a_token_is_for_a_tenant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "no tenant"]) == 2
    assert "tenant must be" in capsys.readouterr().err
