"""Waiting for a service that is still starting: what a failed poll means, and when to give up."""

import time

import grpc

from vlcache._errors import DeadlineExceeded, Unavailable, VlcacheError, error_from_rpc

POLL_INTERVAL_S = 0.1


class Readiness:
    """The clock of one wait. Whoever polls asks `left_s` before each poll and reports a failed one to `note`."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._last_failure: VlcacheError | None = None

    def left_s(self) -> float:
        """Seconds that the next poll may take. Raises DeadlineExceeded when none are left."""
        left_s = self._deadline - time.monotonic()
        if left_s > 0:
            return left_s
        why = self._last_failure.message if self._last_failure else "the service has no model"
        raise DeadlineExceeded(
            f"not ready within {self._timeout_s} s: {why}", code=grpc.StatusCode.DEADLINE_EXCEEDED
        ) from self._last_failure

    def note(self, rpc_error: grpc.RpcError) -> None:
        """Takes a failed poll in; raises its error when waiting cannot help."""
        failure = error_from_rpc(rpc_error)
        if not isinstance(failure, Unavailable | DeadlineExceeded):
            raise failure from rpc_error
        self._last_failure = failure
