"""Log lines name their process and their request, in both forms, and libraries say no more than at INFO."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from shared.telemetry.logs import DETAILS, OWN, configure_logging
from shared.telemetry.scope import NOBODY, Scope, current, enter, within
from shared.threads import run_to_end
from tests.unit.shared.recording_span import RecordingSpan

log = logging.getLogger("router.some")
SCOPE = Scope(request_id="r-1", span=RecordingSpan("f" * 32))


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in ("root", *OWN)}
    root.handlers.clear()
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_lines_name_the_process_and_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("decode-3", "WARNING")
    logging.getLogger("some.module").warning("careful")
    log.info("chatter")
    printed = capsys.readouterr()
    assert "decode-3 WARNING some.module: careful\n" in printed.err
    assert "chatter" not in printed.err
    assert printed.out == ""


def test_ids_stand_at_the_end_of_a_line_and_before_an_exception(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("d")
    with within(SCOPE):
        try:
            raise ValueError("why")
        except ValueError:
            log.exception("it failed")
    first, second, *_, last = capsys.readouterr().err.splitlines()
    assert first.endswith(f"d ERROR router.some: it failed request_id=r-1 trace_id={'f' * 32}")
    assert (second, last) == ("Traceback (most recent call last):", "ValueError: why")


def test_a_json_line_has_the_documented_keys(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("d", "INFO", "json")
    log.info("plain %d", 1)
    with within(SCOPE):
        try:
            raise ValueError("two\nlines")
        except ValueError:
            log.exception("it failed", extra={DETAILS: {"tokens": 3}})
    plain, failed = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert plain.keys() == {"time", "level", "service", "logger", "message"}
    assert (plain["level"], plain["service"], plain["logger"], plain["message"]) == (
        "INFO",
        "d",
        "router.some",
        "plain 1",
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", plain["time"])
    assert failed.keys() == plain.keys() | {"request_id", "trace_id", "details", "exception"}
    assert (failed["request_id"], failed["trace_id"], failed["details"]) == ("r-1", "f" * 32, {"tokens": 3})
    assert failed["exception"].endswith("ValueError: two\nlines")


def test_debug_is_for_our_own_code(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("d", "DEBUG")
    log.debug("ours")
    logging.getLogger("PIL.TiffImagePlugin").debug("tag: the whole of a comment")
    logging.getLogger("PIL.TiffImagePlugin").info("theirs")
    printed = capsys.readouterr().err
    assert "ours" in printed
    assert "theirs" in printed
    assert "comment" not in printed


def test_work_in_a_thread_is_still_that_of_its_request() -> None:
    async def main() -> None:
        enter(SCOPE)
        with ThreadPoolExecutor(1) as thread:
            assert await run_to_end(thread, current) is SCOPE
            # the thread itself is nobody's
            assert thread.submit(current).result() is NOBODY
        assert await asyncio.create_task(scope_of_a_task()) is SCOPE

    async def scope_of_a_task() -> Scope:
        return current()

    asyncio.run(main())
    assert current() is NOBODY
