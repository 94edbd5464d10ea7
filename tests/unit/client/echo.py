"""A service that repeats the question, many at a time, and knows how many it had at once."""

# The contract names the methods.
# ruff: noqa: N802

import threading
import time
from collections.abc import Iterator

import grpc
from vlcache.v1 import inference_pb2 as pb

from tests.unit.client.service import ScriptedService, compression, delta, finished, started

HANG = "hang"


class EchoService(ScriptedService):
    """Waits for `delays_s` and `gates`, by question. Nobody answers `HANG`; what begins with "no" is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.delays_s: dict[str, float] = {}
        self.gates: dict[str, threading.Event] = {}
        self.most_at_once = 0
        self.has_begun = threading.Event()
        self._lock = threading.Lock()
        self._now = 0

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        question = request.messages[-1].parts[-1].text
        with self._lock:
            self.requests.append(request)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield started(request.request_id)
            time.sleep(self.delays_s.get(question, 0))
            if question in self.gates:
                self.gates[question].wait(10)
            if question == HANG:
                context.add_callback(self.cancelled.set)
                self.has_begun.set()
                self.cancelled.wait(10)
            if question.startswith("no"):
                context.abort(grpc.StatusCode.NOT_FOUND, question)
            yield delta(question, 5, reason=pb.FINISH_REASON_STOP)
            yield compression()
            yield finished(generated_tokens=1)
        finally:
            with self._lock:
                self._now -= 1
