"""What services have in common is checked, and others are told where to find a worker."""

from __future__ import annotations

import pytest

from shared.config import Listen, ServiceConfig, WorkerConfig


def test_by_default_a_service_listens_on_loopback_and_picks_free_ports() -> None:
    config = ServiceConfig()
    assert (config.host, config.port, config.metrics_port) == ("127.0.0.1", 0, 0)


@pytest.mark.parametrize("port", [0, 1, 65535])
def test_every_port_is_accepted(port: int) -> None:
    assert ServiceConfig(port=port, metrics_port=port).port == port


@pytest.mark.parametrize("port", [-1, 65536, 10**9])
@pytest.mark.parametrize("name", ["port", "metrics_port"])
def test_an_impossible_port_is_refused(name: str, port: int) -> None:
    with pytest.raises(ValueError, match=f"between 0 and 65535, not {port}"):
        ServiceConfig(**{name: port})


def test_a_worker_listens_where_it_was_told_to() -> None:
    config = WorkerConfig(model="m", host="localhost", port=1, metrics_port=2, advertise="node-1:3")
    assert config.listen == Listen(host="localhost", port=1, metrics_port=2, advertise="node-1:3")


@pytest.mark.parametrize(
    ("advertise", "told"),
    [("", "127.0.0.1:7"), ("node-1:9", "node-1:9"), ("node-1:0", "node-1:7"), ("[fe80::1]:0", "[fe80::1]:7")],
)
def test_others_are_told_where_to_find_a_worker(advertise: str, told: str) -> None:
    assert Listen(advertise=advertise).advertised("127.0.0.1:7") == told


@pytest.mark.parametrize("advertise", ["node-1", ":1", "node-1:70000"])
def test_an_impossible_advertised_address_is_refused(advertise: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        WorkerConfig(model="m", advertise=advertise)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_a_registry_never_hears_an_address_that_nobody_can_connect_to(host: str) -> None:
    with pytest.raises(ValueError, match="--advertise"):
        WorkerConfig(model="m", registry="redis://host", host=host, allow_plaintext=True)
    told = WorkerConfig(model="m", registry="redis://host", host=host, advertise="node-1:0", allow_plaintext=True)
    assert told.listen.advertised("0.0.0.0:7") == "node-1:7"
    assert WorkerConfig(model="m", host=host, allow_plaintext=True).registry == ""


@pytest.mark.parametrize("registry", ["static://a:1", "redis://", "elsewhere"])
def test_a_worker_is_refused_a_registry_it_cannot_write_to(registry: str) -> None:
    with pytest.raises(ValueError):
        WorkerConfig(model="m", registry=registry)


@pytest.mark.parametrize("tokens", [0, -1])
def test_a_context_has_a_token_at_least(tokens: int) -> None:
    assert WorkerConfig(model="m", max_model_len=1).max_model_len == 1
    with pytest.raises(ValueError, match=f"max_model_len must be at least 1, not {tokens}"):
        WorkerConfig(model="m", max_model_len=tokens)
