"""What a service is told about its identity, checked before it does anything else."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from decode_worker.config import DecodeConfig
from deploy.combined.config import CombinedConfig
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig
from shared.command_line import parse_config
from shared.config import WorkerConfig
from shared.rpc.identity import TlsFiles
from shared.rpc.security import Security, is_loopback
from tests.certificates import Certificates, flags, settings


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


def configure(role: str, files: TlsFiles | None = None, **more: object) -> Security:
    given = {**(settings(files) if files else {}), **more}
    match role:
        case "router":
            return RouterConfig(registry="static://a:1", **given)
        case "prefill":
            return PrefillConfig(model="m", **given)
        case "decode":
            return DecodeConfig(model="m", **given)
    return CombinedConfig(model="m", **given)


ROLES = {"router": ["router"], "prefill": ["prefill"], "decode": ["decode"], "combined": ["prefill", "decode"]}


@pytest.mark.parametrize("role", ROLES)
def test_a_service_takes_the_certificate_of_its_role_and_no_other(certificates: Certificates, role: str) -> None:
    for name, roles in ROLES.items():
        files = certificates.files(name, roles)
        if set(ROLES[role]) <= set(roles):
            identity = configure(role, files).identity()
            assert identity is not None
            assert identity.current().roles == set(roles)
        else:
            with pytest.raises(ValueError, match="not for this service: it does not name spiffe://vlcache/"):
                configure(role, files)


def test_without_certificates_there_is_no_identity() -> None:
    assert configure("router").identity() is None


@pytest.mark.parametrize("missing", ["tls_cert", "tls_key", "tls_ca"])
def test_it_is_all_three_or_none(certificates: Certificates, missing: str) -> None:
    given = settings(certificates.files("router"))
    del given[missing]
    with pytest.raises(ValueError, match="all three or none"):
        RouterConfig(registry="static://a:1", **given)


def test_every_file_that_cannot_be_used_is_named_with_the_reason(certificates: Certificates, tmp_path: Path) -> None:
    files, other = certificates.files("router"), Certificates(tmp_path / "other").files("router")
    broken = tmp_path / "broken.pem"
    broken.write_text("nothing")
    wrong = {
        "none.pem .* cannot be read: No such file": {"tls_ca": tmp_path / "none.pem"},
        "router.pem with the key .*none.key cannot be read": {"tls_key": tmp_path / "none.key"},
        "broken.pem with the key .* no valid PEM": {"tls_cert": broken},
        "broken.pem of the CA cannot be used": {"tls_ca": broken},
        "do not belong together": {"tls_key": other.key},
        "does not stand before the CA: .*(self-signed|unable to get)": {"tls_ca": other.ca},
    }
    for said, change in wrong.items():
        with pytest.raises(ValueError, match=said):
            RouterConfig(registry="static://a:1", **{**settings(files), **change})


def test_a_certificate_that_has_expired_is_refused(certificates: Certificates) -> None:
    with pytest.raises(ValueError, match="expired"):
        configure("router", certificates.files("router", days=-0.5))


def test_an_encrypted_key_asks_nobody_for_a_password(certificates: Certificates) -> None:
    files = certificates.files("router")
    key = serialization.load_pem_private_key(files.key.read_bytes(), password=None)
    encryption = serialization.BestAvailableEncryption(b"password")
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    files.key.write_bytes(key.private_bytes(encoding, form, encryption))
    with pytest.raises(ValueError, match="cannot be used"):
        configure("router", files)


FAR = ["0.0.0.0", "[::]", "10.0.0.1", "node-1"]


def listening_on(host: str, **given: object) -> Iterator[Callable[[], Security]]:
    """Configurations of every service."""
    yield lambda: RouterConfig(registry="static://a:1", host=host, **given)
    for kind in (WorkerConfig, PrefillConfig, DecodeConfig, CombinedConfig):
        yield partial(kind, model="m", host=host, **given)


@pytest.mark.parametrize("host", FAR)
def test_plaintext_stays_on_loopback_unless_it_is_allowed(certificates: Certificates, host: str) -> None:
    for configure_one in listening_on(host):
        with pytest.raises(ValueError, match=re.escape(host) + ".*--tls-cert.*--allow-plaintext"):
            configure_one()
    tls = settings(certificates.files("all", ["router", "prefill", "decode"]))
    for configure_one in (*listening_on(host, allow_plaintext=True), *listening_on(host, **tls)):
        configure_one()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "[::1]", "::1"])
def test_this_machine_is_near(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", [*FAR, "", "127.0.0.1.example", "localhost.example", "[::ffff:10.0.0.1]"])
def test_everything_else_is_not(host: str) -> None:
    assert not is_loopback(host)


def test_a_client_certificate_cannot_be_demanded_without_tls() -> None:
    with pytest.raises(ValueError, match="demand_client_cert needs"):
        RouterConfig(registry="static://a:1", demand_client_cert=True)


SERVICES = {"router": RouterConfig, "prefill": PrefillConfig, "decode": DecodeConfig, "combined": CombinedConfig}


@pytest.mark.parametrize("role", SERVICES)
def test_a_command_line_that_is_wrong_ends_with_a_sentence(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], role: str
) -> None:
    needs = ["--registry", "static://a:1"] if role == "router" else ["--model", "/nowhere"]
    of_no_service = flags(certificates.files("client"))
    monkeypatch.setenv("COLUMNS", "1000")
    for given, said in (
        (["--host", "0.0.0.0"], "--allow-plaintext"),
        (of_no_service[:2], "all three or none"),
        (of_no_service, "not for this service"),
    ):
        monkeypatch.setattr(sys, "argv", ["service", *needs, *given])
        with pytest.raises(SystemExit) as ended:
            parse_config(SERVICES[role], "A service.")
        assert ended.value.code not in (0, None)
        printed = capsys.readouterr()
        assert said in f"{ended.value.code}{printed.out}{printed.err}"
