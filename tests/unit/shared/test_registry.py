"""Which workers a `--registry` flag names."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlcache.worker.v1 import worker_pb2

from shared.registry.address import split_address
from shared.registry.entry import MAX_ENTRY_BYTES, Entry, read_address
from shared.registry.location import open_listing, open_registry
from shared.registry.static import StaticRegistry

BAD_ADDRESSES = [
    "a",
    "a:",
    ":1",
    "a:0",
    "a:65536",
    "a:-1",
    "a:x",
    "a:\u0661",
    "a:1 ",
    "a:1\n",
    "unix:/a:1",
    "dns:///a:1",
]


def test_a_static_registry_lists_its_addresses_in_order() -> None:
    registry = open_registry("static://b:2, a:1,[::1]:3,")
    assert asyncio.run(registry.addresses()) == ("b:2", "a:1", "[::1]:3")
    asyncio.run(registry.close())


@pytest.mark.parametrize("location", ["", "static", "http://host:1", "host:1", "STATIC://host:1", "unix://redis"])
def test_an_unknown_scheme_is_refused_and_the_known_ones_are_named(location: str) -> None:
    with pytest.raises(ValueError, match="static://, redis://, rediss://"):
        open_registry(location)


@pytest.mark.parametrize("location", ["static://a:1", "", "host:1"])
def test_workers_publish_themselves_only_where_something_can_be_written(location: str) -> None:
    with pytest.raises(ValueError, match="starts with redis://, rediss://"):
        open_listing(location)


@pytest.mark.parametrize("open_it", [open_registry, open_listing])
def test_what_may_be_a_password_is_not_repeated(open_it: object) -> None:
    with pytest.raises(ValueError) as refused:
        open_it("redis;//user:secret@host")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("location", ["static://", "static:// , "])
def test_an_empty_list_is_refused(location: str) -> None:
    with pytest.raises(ValueError, match="at least one worker"):
        open_registry(location)


def test_a_worker_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="once"):
        StaticRegistry(["a:1", "a:1"])


@pytest.mark.parametrize("address", BAD_ADDRESSES)
def test_an_address_that_is_not_host_and_port_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        StaticRegistry([address])
    with pytest.raises(ValueError, match="host:port"):
        read_address(json.dumps({"address": address}).encode())


@pytest.mark.parametrize(
    ("address", "parts"),
    [("a.b-c_d:1", ("a.b-c_d", 1)), ("10.0.0.1:65535", ("10.0.0.1", 65535)), ("[fe80::1]:7", ("[fe80::1]", 7))],
)
def test_an_address_has_a_host_and_a_port(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


def test_only_what_is_used_is_loaded() -> None:
    """redis-py belongs to those who use Redis."""
    script = """
import sys
import router.config
import shared.rpc.serving
from shared.registry.location import open_registry
open_registry("static://a:1")
assert "redis" not in sys.modules
open_registry("redis://a:1")
assert "redis" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_entry_tells_operators_everything_and_routers_an_address() -> None:
    info = worker_pb2.WorkerInfo(name="w", role="decode", epoch="e1", state="draining", outstanding_tokens=2**40)
    info.model.compatibility = "abc"
    info.kv.capacity = 5
    entry = Entry(address="host:1", info=info)
    told = json.loads(entry.to_json())
    assert told["address"] == read_address(entry.to_json().encode()) == "host:1"
    worker = told["worker"]
    assert [worker[name] for name in ("name", "role", "epoch", "state")] == ["w", "decode", "e1", "draining"]
    assert (worker["model"]["compatibility"], worker["kv"]["capacity"], worker["kv"]["reserved"]) == ("abc", "5", "0")
    assert (worker["outstanding_tokens"], worker["arena_socket"]) == (str(2**40), "")


def test_entries_of_the_same_name_and_of_the_same_process_have_names_of_their_own() -> None:
    infos = [
        worker_pb2.WorkerInfo(name="w", role=role, epoch=epoch) for role in ("prefill", "decode") for epoch in "12"
    ]
    assert len({Entry(address="a:1", info=info).name for info in infos}) == 4


LONG = b'{"address": "a:1", "x": "%s"}' % (b"x" * MAX_ENTRY_BYTES)


@pytest.mark.parametrize(
    "value",
    [b"{", b"\xff", b"[]", b"null", b"{}", b'{"address": 1}', b"[" * 5000, LONG],
    ids=["cut", "no text", "list", "null", "empty", "number", "deep", "long"],
)
def test_an_entry_that_no_worker_wrote_is_a_value_error(value: bytes) -> None:
    with pytest.raises(ValueError):
        read_address(value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.just("address"), inner, max_size=3),
)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_whatever_is_read_is_an_address_or_a_value_error(value: bytes) -> None:
    with contextlib.suppress(ValueError):
        split_address(read_address(value))
