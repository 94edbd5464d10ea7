"""A preprocessing process: reads conversations from the socket that is its stdin, and answers with arrays.

Started through `prefill_worker.preprocess.child` alone.
"""

from __future__ import annotations

import json
import logging
import socket
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from prefill_worker.preprocess.processing import PromptLimits, PromptProcessor
from prefill_worker.preprocess.wire import (
    PREFIX,
    READY,
    Frame,
    error_frame,
    read_request,
    reply_frame,
    request_id_of,
    sizes,
)
from shared.errors import InternalError, InvalidRequestError, ServiceError
from shared.model.processor import load_processor
from shared.telemetry.logs import configure_logging
from shared.telemetry.scope import Scope, enter

log = logging.getLogger(__name__)

STDIN = 0


def main() -> None:
    """Loads the processor of a checkpoint and answers until the worker hangs up."""
    checkpoint, settings = sys.argv[1], json.loads(sys.argv[2])
    configure_logging("preprocess", **settings["logging"])
    processor = PromptProcessor(load_processor(Path(checkpoint)), PromptLimits(**settings["limits"]))
    # the first request should not pay for what is loaded late
    processor.marker_tokens()
    with socket.socket(fileno=STDIN) as worker:
        serve(worker, processor)


def serve(worker: socket.socket, processor: PromptProcessor) -> None:
    """Answers one conversation after the other."""
    _send(worker, READY)
    while prefix := worker.recv(PREFIX.size, socket.MSG_WAITALL):
        header, body = (_receive(worker, count) for count in sizes(prefix))
        _send(worker, answer(processor, json.loads(bytes(header)), body))


def answer(processor: PromptProcessor, header: Mapping[str, Any], body: memoryview) -> Frame:
    """What becomes of a conversation; also a bug ends nothing but this one request."""
    enter(Scope(request_id=request_id_of(header)))
    try:
        messages, max_new_tokens = read_request(header, body)
        return reply_frame(processor.process(messages, max_new_tokens=max_new_tokens))
    except ServiceError as error:
        return error_frame(error)
    # protobuf has an error of its own for that, and the worker sends nothing that it could not read otherwise
    except (MemoryError, DecodeError):
        return error_frame(
            InvalidRequestError("the images of this request take too much memory to read", reason="PREPROCESS_MEMORY")
        )
    except Exception as error:
        log.error("a request could not be preprocessed: %s", _outline(error))
        return error_frame(InternalError("the request could not be preprocessed"))


def _outline(error: Exception) -> str:
    """Where it happened and what it is; not its text, in which libraries quote what they were given."""
    return f"{type(error).__name__}\n{''.join(traceback.format_tb(error.__traceback__)).rstrip()}"


def _receive(worker: socket.socket, count: int) -> memoryview:
    data = memoryview(bytearray(count))
    view = data
    while view and (got := worker.recv_into(view)):
        view = view[got:]
    return data


def _send(worker: socket.socket, frame: Frame) -> None:
    for piece in frame.pieces():
        worker.sendall(piece)


if __name__ == "__main__":
    main()
