"""Every error has a status of its own and survives the way over a real server."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import errors
from shared.rpc.status import ERROR_BY_CODE, MAX_MESSAGE_BYTES, from_rpc_error, to_status
from tests.unit.shared.scripted import failure, raising, run, serving

CONCRETE = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.ServiceError) and value is not errors.ServiceError
]
DIRECT = [cls for cls in CONCRETE if cls.__bases__ == (errors.ServiceError,)]


async def over_the_wire(error: errors.ServiceError) -> errors.ServiceError:
    async with serving(raising(error)) as (_, channel):
        return from_rpc_error(await failure(channel))


@pytest.mark.parametrize("cls", CONCRETE)
def test_every_error_names_a_grpc_status_other_than_ok(cls: type[errors.ServiceError]) -> None:
    assert grpc.StatusCode[cls.code] is not grpc.StatusCode.OK
    assert to_status(cls("text")).code is grpc.StatusCode[cls.code]


def test_no_two_direct_subclasses_share_a_status_and_all_are_mapped() -> None:
    assert len({cls.code for cls in DIRECT}) == len(DIRECT)
    assert {cls.code: cls for cls in DIRECT} == ERROR_BY_CODE
    assert len({cls.default_reason for cls in CONCRETE}) == len(CONCRETE)


@pytest.mark.parametrize("cls", [cls for cls in CONCRETE if cls not in DIRECT])
def test_deeper_subclasses_keep_the_status_of_their_parent(cls: type[errors.ServiceError]) -> None:
    assert cls.code == cls.__bases__[0].code


@pytest.mark.parametrize("cls", CONCRETE)
@pytest.mark.parametrize(("reason", "retry_after_s"), [("", None), ("A_REASON", None), ("A_REASON", 1.25), ("", 0.0)])
def test_every_error_round_trips_through_a_server(
    cls: type[errors.ServiceError], reason: str, retry_after_s: float | None
) -> None:
    async def main() -> None:
        sent = cls("what happened", reason=reason, retry_after_s=retry_after_s)
        received = await over_the_wire(sent)
        # the reason tells a deeper class from its parent
        expected = ERROR_BY_CODE[cls.code] if reason else cls
        assert type(received) is expected
        assert received.message == str(received) == "what happened"
        assert received.reason == (reason or cls.default_reason)
        assert received.retry_after_s == retry_after_s
        assert received.retryable is expected.retryable

    run(main)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300))
@settings(max_examples=15)
def test_any_message_round_trips(text: str) -> None:
    async def main() -> None:
        assert (await over_the_wire(errors.InvalidRequestError(text))).message == text

    run(main)


@pytest.mark.parametrize("character", ["x", "é", "☃", "😀"])
def test_a_long_message_is_shortened_and_keeps_its_status(character: str) -> None:
    """gRPC refuses large metadata: an unknown model with a name of a megabyte must stay NOT_FOUND."""

    async def main() -> None:
        received = await over_the_wire(errors.NotFoundError(f"model {character * 1_000_000}"))
        assert type(received) is errors.NotFoundError
        assert received.message.startswith(f"model {character * 100}")
        assert received.message.endswith("…")
        assert len(received.message.encode()) <= MAX_MESSAGE_BYTES

    run(main)


@pytest.mark.parametrize("length", [MAX_MESSAGE_BYTES - 1, MAX_MESSAGE_BYTES])
def test_a_message_that_just_fits_is_not_touched(length: int) -> None:
    assert to_status(errors.InternalError("x" * length)).details == "x" * length


def test_details_name_the_domain_the_worker_and_whether_to_retry() -> None:
    async def main() -> None:
        async with serving(raising(errors.ResourceExhaustedError("full")), name="prefill-7") as (_, channel):
            status = rpc_status.from_call(await failure(channel))
        info = error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(info)
        assert info.domain == "vlcache"
        assert info.metadata == {"worker": "prefill-7", "retryable": "true"}

    run(main)


def test_connection_refused_is_unavailable_without_an_address() -> None:
    async def main() -> None:
        async with serving({}) as (server, _):
            address = server.address
        async with grpc.aio.insecure_channel(address) as channel:
            error = from_rpc_error(await failure(channel))
        assert type(error) is errors.UnavailableError
        assert error.reason == "WORKER_UNREACHABLE"
        assert error.retryable
        assert "127.0.0.1" not in error.message
        assert address.rpartition(":")[2] not in error.message

    run(main)


def test_a_status_outside_the_tree_is_an_internal_error() -> None:
    async def main() -> None:
        async with serving({}) as (_, channel):
            error = from_rpc_error(await failure(channel))
        assert type(error) is errors.InternalError

    run(main)


@pytest.mark.parametrize("details", [b"\xff\xff", b"\x08\x05\x12\x05other"])
def test_details_that_do_not_fit_the_status_are_ignored(details: bytes) -> None:
    async def abort(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        context.set_trailing_metadata((("grpc-status-details-bin", details),))
        await context.abort(grpc.StatusCode.NOT_FOUND, "gone")
        return b""

    async def main() -> None:
        async with serving({"UnaryUnary": grpc.unary_unary_rpc_method_handler(abort)}) as (_, channel):
            error = from_rpc_error(await failure(channel))
        assert type(error) is errors.NotFoundError
        assert error.message == "gone"

    run(main)


@pytest.mark.parametrize("named", ["", "d-1"])
def test_stage_and_worker_survive_and_the_reporter_stands_in_for_a_missing_worker(named: str) -> None:
    async def main() -> None:
        received = await over_the_wire(errors.UnavailableError("gone", stage="transfer", worker=named))
        assert received.stage == "transfer"
        assert received.worker == (named or "scripted")

    run(main)


def test_only_what_an_error_does_not_say_is_filled_in() -> None:
    error = errors.DataLossError("broken", stage="transfer")
    assert error.at("decode", "d-1") is error
    assert (error.stage, error.worker) == ("transfer", "d-1")
