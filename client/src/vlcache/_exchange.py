"""One `Generate` call as both clients see it: what to send, when to send it again, what came back."""

import grpc

from vlcache._attempts import Attempts
from vlcache._completion import Collector, Completion
from vlcache._errors import Cancelled, DeadlineExceeded, InternalError, VlcacheError, error_from_rpc
from vlcache._events import Event, event_from_proto
from vlcache._settings import RetryPolicy, Timeout
from vlcache.v1 import inference_pb2


class Exchange:
    """The state of one request, owned by one stream and free of input and output.

    The stream calls `begin_attempt` before each RPC, `receive` for each response, `failure` and `backoff_s`
    when the RPC fails, and `check_finished` when it ends well.
    """

    def __init__(self, request: inference_pb2.GenerateRequest, *, timeout: Timeout, policy: RetryPolicy) -> None:
        self.request = request
        self._timeout = timeout
        self._attempts = Attempts(policy=policy, total_s=timeout.total_s)
        self._collector = Collector(request.request_id)
        self._has_event = False

    @property
    def has_token(self) -> bool:
        """Whether the first token has arrived."""
        return self._collector.has_token

    def begin_attempt(self) -> float:
        """Counts an attempt; returns the seconds it may take, the timeout of its RPC."""
        return self._attempts.begin()

    def first_token_left_s(self) -> float | None:
        """Seconds in which the first token must arrive; None when nothing limits them (any more)."""
        if self._timeout.first_token_s is None or self.has_token:
            return None
        return max(0.0, self._timeout.first_token_s - self._attempts.elapsed_s())

    def receive(self, response: inference_pb2.GenerateResponse) -> Event | None:
        """Takes a response in; returns its event, or None for a kind that this client does not know."""
        event = event_from_proto(response)
        if event is not None:
            self._has_event = True
            self._collector.add(event, self._attempts.elapsed_s())
        return event

    def failure(self, rpc_error: grpc.RpcError) -> VlcacheError:
        """The error that a failed RPC of this request stands for."""
        return error_from_rpc(rpc_error, request_id=self.request.request_id)

    def backoff_s(self, failure: VlcacheError) -> float | None:
        """Seconds to wait before the next attempt; None when there is to be none."""
        if self._has_event:
            return None
        limits_s = (self._timeout.total_s, self._timeout.first_token_s)
        return self._attempts.backoff_s(failure, within_s=min(limit_s for limit_s in limits_s if limit_s is not None))

    def first_token_late(self) -> DeadlineExceeded:
        """The error of a first token that did not arrive in time."""
        return DeadlineExceeded(
            f"no token within {self._timeout.first_token_s} s",
            code=grpc.StatusCode.DEADLINE_EXCEEDED,
            request_id=self.request.request_id,
            details={"stage": "first_token"},
        )

    def closed(self) -> Cancelled:
        """The error of a stream that was closed before it had finished."""
        return Cancelled(
            "the stream was closed before it had finished",
            code=grpc.StatusCode.CANCELLED,
            request_id=self.request.request_id,
        )

    def check_finished(self) -> None:
        """Raises InternalError when the service ended the stream without `finished`."""
        if self._collector.completion() is None:
            raise InternalError(
                "the service ended the stream without `finished`",
                code=grpc.StatusCode.INTERNAL,
                request_id=self.request.request_id,
            )

    def completion(self) -> Completion:
        """The whole answer. Raises Cancelled when the stream was left before the end."""
        completion = self._collector.completion()
        if completion is None:
            raise self.closed()
        return completion
