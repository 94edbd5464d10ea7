import grpc
import pytest
import vlcache
from vlcache import VlcacheError
from vlcache._errors import ERROR_BY_CODE, error_from_rpc

from tests.unit.client.service import fail, status_details


class FakeRpcError(grpc.RpcError):
    def __init__(self, code, details="why", metadata=None):
        self._answer = (code, details, metadata)

    def code(self):
        return self._answer[0]

    def details(self):
        return self._answer[1]

    def trailing_metadata(self):
        return self._answer[2]


def with_details(code, **details):
    return FakeRpcError(code, metadata=(("grpc-status-details-bin", status_details(code, **details)),))


def test_every_status_code_but_ok_is_mapped():
    assert set(ERROR_BY_CODE) == set(grpc.StatusCode) - {grpc.StatusCode.OK}


def test_every_error_is_public_and_has_a_code():
    public = {value for value in vars(vlcache).values() if isinstance(value, type) and issubclass(value, VlcacheError)}
    assert public == set(ERROR_BY_CODE.values()) | {VlcacheError}


@pytest.mark.parametrize(("code", "error_type"), ERROR_BY_CODE.items())
def test_an_error_survives_the_wire(service, client, code, error_type):
    service.attempts = [[fail(code, "the reason", reason="WHY", retryable="false", stage="prefill")]]
    with pytest.raises(error_type) as caught:
        client.generate("?", request_id="r7")
    error = caught.value
    assert type(error) is error_type
    assert (error.code, error.message, error.request_id) == (code, "the reason", "r7")
    assert (error.reason, error.details["stage"]) == ("WHY", "prefill")
    assert str(error) == f"the reason [{code.name} WHY, request r7]"


def test_retry_info_is_read():
    error = error_from_rpc(with_details(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_s=1.25))
    assert error.retry_after_s == 1.25
    assert error.retryable


def test_only_what_may_pass_is_retryable():
    retryable = {code for code in ERROR_BY_CODE if error_from_rpc(FakeRpcError(code)).retryable}
    # RESOURCE_EXHAUSTED without RetryInfo is a limit that waiting does not move, such as a message size.
    assert retryable == {grpc.StatusCode.UNAVAILABLE}


def test_the_word_of_the_server_overrules():
    assert not error_from_rpc(with_details(grpc.StatusCode.UNAVAILABLE, retryable="false")).retryable
    assert error_from_rpc(with_details(grpc.StatusCode.ABORTED, retryable="true")).retryable


@pytest.mark.parametrize("metadata", [None, (), (("other", "x"),), (("grpc-status-details-bin", b"\xff\xff"),)])
def test_missing_or_broken_details_do_not_hide_the_status(metadata):
    error = error_from_rpc(FakeRpcError(grpc.StatusCode.UNAVAILABLE, metadata=metadata))
    assert (type(error), error.reason, error.retry_after_s, error.details) == (vlcache.Unavailable, "", None, {})
    assert str(error) == "why [UNAVAILABLE]"


def test_an_empty_text_becomes_the_name_of_the_code():
    assert error_from_rpc(FakeRpcError(grpc.StatusCode.ABORTED, details=None)).message == "ABORTED"
