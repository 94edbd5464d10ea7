"""What is logged about preprocessing names its request, and quotes nothing of it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from prefill_worker.preprocess.process import answer
from prefill_worker.preprocess.wire import PREFIX, request_frame
from shared.errors import InvalidRequestError
from shared.telemetry.scope import Scope, current, enter
from tests.unit.prefill_worker.preprocess.test_pool import Setting
from tests.unit.prefill_worker.prompts import user

CANARY = "canary-7f3a"


class Lines(logging.Handler):
    """Log lines with the request that they are about."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))
        self.seen: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append((current().request_id, self.format(record)))


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler, logger = Lines(), logging.getLogger("prefill_worker")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


class Quoting:
    """A processor whose library says what it was given."""

    def process(self, messages: Any, *, max_new_tokens: int) -> Any:
        try:
            raise KeyError(CANARY)
        except KeyError as error:
            raise ValueError(f"cannot read {messages}") from error


def test_a_bug_is_told_without_the_prompt(lines: Lines) -> None:
    async def main() -> None:
        pieces = request_frame([user(CANARY)], max_new_tokens=1, request_id="r-1").pieces()
        header, body = json.loads(pieces[1]), memoryview(b"".join(pieces[2:]))
        assert PREFIX.unpack(pieces[0])[1] == len(body)
        assert answer(Quoting(), header, body).header["error"] == "InternalError"

    asyncio.run(main())
    ((request_id, line),) = lines.seen
    assert request_id == "r-1"
    assert "could not be preprocessed: ValueError" in line
    assert ", in process" in line
    assert CANARY not in line


def test_a_replaced_process_is_told_by_the_request_that_ended_it(lines: Lines) -> None:
    async def main() -> None:
        setting = Setting(processes=1)
        enter(Scope(request_id="r-2"))
        setting.processes.errors[5] = EOFError()
        with pytest.raises(InvalidRequestError, match="broke down"):
            await setting.build(5)
        enter(Scope(request_id="r-3"))
        await setting.build(6)
        await setting.pool.close()

    asyncio.run(main())
    assert lines.seen == [("r-2", "a preprocessing process was replaced: crash")]
