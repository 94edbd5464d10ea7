"""`python -m shared.model.grammar_process PARENT`: compiles what strangers send, which may end it.

A line of JSON in, a line of JSON out: first the tokens, then a kind and a text each time, which are answered with the
reason for a refusal, or with null.
"""

from __future__ import annotations

import json
import resource
import sys
import threading

from llguidance import LLTokenizer

from shared.errors import InvalidRequestError
from shared.model.grammar import Grammar, tokens_from_json
from shared.parent import die_with
from shared.request.constraint import Constraint

MEMORY_BYTES = 1 << 30
# The library recurses into grammars. Half of the smallest stack that a worker's threads have: what it can do here, it
# can do there.
STACK_BYTES = 1 << 20


def main() -> None:
    """Answers until the worker hangs up."""
    die_with(int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokens = tokens_from_json(sys.stdin.readline()).load()
    threading.stack_size(STACK_BYTES)
    _answer(None)
    for line in sys.stdin:
        kind, text = json.loads(line)
        reply: list[str | None] = []
        trial = threading.Thread(target=lambda: reply.append(_refusal(Constraint(kind, text), tokens)))  # noqa: B023
        trial.start()
        trial.join()
        _answer(reply[0])


def _refusal(constraint: Constraint, tokens: LLTokenizer) -> str | None:
    try:
        Grammar.compile(constraint, tokens).matcher()
    except InvalidRequestError as error:
        return error.message
    return None


def _answer(refusal: str | None) -> None:
    print(json.dumps(refusal), flush=True)


if __name__ == "__main__":
    main()
