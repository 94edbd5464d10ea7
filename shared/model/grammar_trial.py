"""Tries a grammar in a process of its own: where the library hangs, crashes or takes all memory, that alone ends."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

from shared.errors import InvalidRequestError, UnavailableError
from shared.model.grammar import Tokens, tokens_to_json
from shared.request.constraint import REASON, Constraint

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 60.0
# Many times what a schema of 64 KiB takes.
TRIAL_TIMEOUT_S = 5.0


class GrammarTrial:
    """A process, started when the first grammar comes and again after one that it did not survive.

    One thread at a time, and one that stays: with it ends the process.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, constraint: Constraint) -> None:
        """Compiles it there.

        Raises:
            InvalidRequestError: It is refused, or more than the library can cope with.
            UnavailableError: The process does not start.
        """
        process = self._process or self._start()
        try:
            refusal = _ask(process, json.dumps([constraint.kind, constraint.text]), TRIAL_TIMEOUT_S)
        except (TimeoutError, EOFError, OSError) as error:
            self.close()
            message = f"{constraint.kind} cannot be followed: it is too complex"
            raise InvalidRequestError(message, reason=REASON) from error
        if refusal is not None:
            raise InvalidRequestError(refusal, reason=REASON)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(  # noqa: S603 - our own module, no shell
            (sys.executable, "-m", "shared.model.grammar_process", str(os.getpid())),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # ctrl-C is for the worker, which lets its requests finish
            start_new_session=True,
        )
        try:
            _ask(self._process, tokens_to_json(self._tokens), START_TIMEOUT_S)
        except (TimeoutError, EOFError, OSError) as error:
            self.close()
            raise UnavailableError("the process that tries grammars does not start", reason="GRAMMAR_TRIAL") from error
        return self._process


def _ask(process: subprocess.Popen[bytes], line: str, timeout_s: float) -> str | None:
    assert process.stdin is not None
    assert process.stdout is not None
    rest = memoryview(f"{line}\n".encode())
    while rest:
        rest = rest[process.stdin.write(rest) or 0 :]
    return json.loads(_line(process.stdout.fileno(), time.monotonic() + timeout_s))


def _line(descriptor: int, until: float) -> bytes:
    received, poll = b"", select.poll()
    poll.register(descriptor, select.POLLIN)
    while not received.endswith(b"\n"):
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            raise TimeoutError("the process does not answer")
        piece = os.read(descriptor, 1 << 16)
        if not piece:
            raise EOFError("the process has ended")
        received += piece
    return received
