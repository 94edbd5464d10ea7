"""The page of the protocol says what the code does: reasons, RPCs, clocks, tests."""

from __future__ import annotations

import re

import pytest
from vlcache import RetryPolicy, Timeout
from vlcache.v1 import inference_pb2
from vlcache.worker.v1 import kv_pb2

from decode_worker.config import DecodeConfig
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig
from router.requests.finished import KEEP_S, MAX_ANSWER_BYTES, MAX_ANSWERS, MAX_BYTES
from router.requests.parcels import RENEWALS_PER_LEASE
from router.workers.circuit import OPEN_S
from shared import errors
from shared.kv.secret import SECRET_BYTES
from shared.kv.transport.frames import CHUNK_BYTES
from shared.rpc.access import CALLERS
from shared.rpc.status import ERROR_BY_CODE
from tests.documents.pages import ROOT
from tests.documents.reasons import reasons

PAGE = (ROOT / "docs/protocol.md").read_text()
FIELDS = {
    **DecodeConfig.__dataclass_fields__,
    **PrefillConfig.__dataclass_fields__,
    **RouterConfig.__dataclass_fields__,
}
MIB = 1 << 20


def rows(text: str) -> list[list[str]]:
    """The cells of a table, without its first two lines."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines][2:]


def section(heading: str) -> str:
    return PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]


REASONS = {
    row[0].strip("`"): row for row in rows(PAGE.split("<!-- reasons: begin -->")[1].split("<!-- reasons: end")[0])
}


def test_every_code_has_a_row() -> None:
    assert set(REASONS) == set(ERROR_BY_CODE) == set(reasons())


@pytest.mark.parametrize("code", sorted(ERROR_BY_CODE))
def test_reasons_are_those_that_are_raised(code: str) -> None:
    told = set(re.findall(r"`([A-Z_]+)`", " ".join(REASONS[code][3:])))
    assert told == reasons()[code]


def test_what_may_be_asked_again_says_so() -> None:
    retryable = {code for code, row in REASONS.items() if row[2].startswith("yes")}
    assert retryable == {code for code, cls in ERROR_BY_CODE.items() if cls.retryable}
    exceptions = [
        sub for cls in ERROR_BY_CODE.values() for sub in cls.__subclasses__() if sub.retryable != cls.retryable
    ]
    assert exceptions == [errors.TooLargeError]
    assert "`TOO_LARGE`" in REASONS["RESOURCE_EXHAUSTED"][2]


def test_events_are_those_of_the_contract() -> None:
    told = [row[0].strip("`") for row in rows(section("For clients"))]
    assert told == [field.name for field in inference_pb2.GenerateResponse.DESCRIPTOR.fields]


def test_rpcs_and_their_callers_are_those_of_the_table() -> None:
    told = {
        f"/vlcache.worker.v1.{row[0].strip('`')}/{rpc}": row[1].split()[0]
        for row in rows(section("For workers"))
        for rpc in re.findall(r"`(\w+)`", row[2])
    }
    assert told == dict(CALLERS)


def test_every_part_of_a_manifest_is_named() -> None:
    table = section("What is in a parcel").split("| transport |")[0]
    told = {name for row in rows(table) for name in re.findall(r"`(\w+)`", row[0])}
    # said outside the table
    assert told | {"model"} == {field.name for field in kv_pb2.KVManifest.DESCRIPTOR.fields}


@pytest.mark.parametrize("row", rows(section("Clocks of the router")), ids=lambda row: row[0])
def test_clocks_have_their_defaults(row: list[str]) -> None:
    name = row[0].strip("`").removeprefix("--").replace("-", "_")
    assert float(row[1]) == FIELDS[name].default


def test_numbers_are_those_of_the_code() -> None:
    for flag, name in [
        ("max-failovers", "max_failovers"),
        ("lease-s", "lease_s"),
        ("parcel-lease-s", "parcel_lease_s"),
    ]:
        assert f"`--{flag}` ({FIELDS[name].default:g}" in PAGE
    assert f"`--step-timeout-s` ({FIELDS['step_timeout_s'].default:g})" in PAGE
    assert (KEEP_S, MAX_ANSWERS, MAX_BYTES, MAX_ANSWER_BYTES) == (60, 4096, 64 * MIB, MIB)
    assert (RENEWALS_PER_LEASE, OPEN_S, SECRET_BYTES, CHUNK_BYTES) == (6, 5, 16, 1.5 * MIB)
    policy, timeout = RetryPolicy(), Timeout()
    retries = (policy.max_attempts, policy.initial_backoff_s, policy.max_backoff_s, policy.jitter, timeout.total_s)
    assert retries == (4, 0.2, 5, 0.5, 600)


def test_every_failure_names_its_test() -> None:
    named = [row[3] for row in rows(section("Failures"))]
    assert len(named) > 12
    for cell in named:
        path = re.fullmatch(r"`(tests/\S+)`", cell)
        assert cell in ("same", "both") or (path and (ROOT / path[1]).exists())
