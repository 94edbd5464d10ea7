"""What a `redis://` location says, and what it must not."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.registry.redis_client import PASSWORD_VARIABLE, RedisLocation


@pytest.fixture(autouse=True)
def no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)


def test_a_host_is_enough() -> None:
    location = RedisLocation.parse("redis://cache")
    assert (location.host, location.port, location.db) == ("cache", 6379, 0)
    assert (location.username, location.password, location.tls) == (None, None, {})
    assert location.entries == "vlcache:worker:"


def test_everything_can_be_said() -> None:
    location = RedisLocation.parse("redis://me:p%40ss%2F@[::1]:7000/3?prefix=blue:")
    assert (location.host, location.port, location.db) == ("::1", 7000, 3)
    assert (location.username, location.password, location.entries) == ("me", "p@ss/", "blue:worker:")


def test_a_password_comes_from_the_environment_unless_the_location_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, "hidden")
    assert RedisLocation.parse("redis://me@host").password == "hidden"
    assert RedisLocation.parse("redis://host").password == "hidden"
    assert RedisLocation.parse("redis://me:said@host").password == "said"


def test_a_password_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, "hidden")
    assert "hidden" not in repr(RedisLocation.parse("redis://me@host"))
    assert "said" not in repr(RedisLocation.parse("redis://me:said@host"))


@pytest.mark.parametrize(
    "location",
    ["redis://", "redis:///1", "redis://host:0", "redis://host:x", "redis://host:70000", "redis://host/x",
     "redis://host/-1", "redis://host/1/2", "redis://host#x", "redis://host?prefix=", "redis://host?prefix=a*",
     "redis://host?prefix=" + "a" * 65, "redis://host?db=1", "redis://host?ssl_ca_certs=/dev/null",
     "rediss://host?ssl_cert_reqs=none", "rediss://host?ssl_ca_certs=/nowhere", "redis://[::1"],
)  # fmt: skip
def test_what_cannot_be_read_is_a_value_error(location: str) -> None:
    with pytest.raises(ValueError):
        RedisLocation.parse(location)


@pytest.mark.parametrize(
    "password", ["a/secret", "a?secret", "a#secret", "1/secret", "1?secret", "1#secret", "1/2@secret"]
)
def test_a_password_with_special_signs_is_refused_without_being_repeated(password: str) -> None:
    with pytest.raises(ValueError) as refused:
        RedisLocation.parse(f"redis://me:{password}@host")
    assert "secret" not in str(refused.value)


def test_tls_names_files_and_always_checks_the_host(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")}
    for file in files.values():
        file.touch()
    query = "&".join(f"{name}={file}" for name, file in files.items())
    location = RedisLocation.parse(f"rediss://host?{query}")
    named = {name: str(file) for name, file in files.items()}
    assert location.tls == {"ssl": True, "ssl_check_hostname": True, **named}
    arguments = location.connect().connection_pool.connection_kwargs
    assert {name: arguments[name] for name in named} == named
    assert (arguments["ssl_cert_reqs"], arguments["ssl_check_hostname"]) == ("required", True)
