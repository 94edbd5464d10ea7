"""The compiled constraints of a worker: each compiled once, in a thread of its own, and kept while there is room."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from llguidance import LLTokenizer

from shared.errors import ResourceExhaustedError
from shared.model.grammar import Grammar, Tokens
from shared.model.grammar_trial import GrammarTrial
from shared.request.constraint import Constraint

# The largest take tens of MiB each.
MAX_KEPT = 16
MAX_WAITING = 64


class Grammars:
    """Owner of compiled constraints and of the process that tries them. Lives on the event loop.

    Nothing is loaded or started before the first constraint.

    Args:
        tokenizer: A transformers tokenizer.
        vocabulary: How many logits the model has.
    """

    def __init__(self, tokenizer: Any, *, vocabulary: int, eos_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._eos_token_ids = eos_token_ids
        self._kept: OrderedDict[Constraint, Grammar] = OrderedDict()
        self._compiling: dict[Constraint, asyncio.Task[Grammar]] = {}
        # its thread has the tokens, too: a large vocabulary takes a second to read
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._loaded: tuple[LLTokenizer, GrammarTrial] | None = None

    async def of(self, constraint: Constraint | None) -> Grammar | None:
        """The grammar of a constraint; None of none.

        Raises:
            InvalidRequestError: It cannot be followed; the message says why.
            ResourceExhaustedError: Too many others are being compiled.
        """
        if constraint is None:
            return None
        if constraint in self._kept:
            self._kept.move_to_end(constraint)
            return self._kept[constraint]
        # whoever leaves does not take it from others who wait for the same
        return await asyncio.shield(self._compiling.get(constraint) or self._begin(constraint))

    def close(self) -> None:
        """Ends thread and process."""
        for task in self._compiling.values():
            task.cancel()
        self._thread.shutdown(cancel_futures=True)
        if self._loaded:
            self._loaded[1].close()

    def check_integrity(self) -> None:
        """Asserts that no more is kept than may be."""
        assert len(self._kept) <= MAX_KEPT

    def _begin(self, constraint: Constraint) -> asyncio.Task[Grammar]:
        if len(self._compiling) >= MAX_WAITING:
            raise ResourceExhaustedError(
                "too many constraints are being compiled", reason="QUEUE_FULL", retry_after_s=1
            )
        task = asyncio.create_task(self._in_thread(constraint))
        self._compiling[constraint] = task
        task.add_done_callback(partial(self._done, constraint))
        return task

    async def _in_thread(self, constraint: Constraint) -> Grammar:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._compile, constraint)

    def _done(self, constraint: Constraint, task: asyncio.Task[Grammar]) -> None:
        del self._compiling[constraint]
        # whoever asked may be gone: asyncio would complain that nobody looked
        if not task.cancelled() and task.exception() is None:
            self._kept[constraint] = task.result()
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)

    def _compile(self, constraint: Constraint) -> Grammar:
        tokens, trial = self._loaded = self._loaded or self._load()
        trial.check(constraint)
        return Grammar.compile(constraint, tokens)

    def _load(self) -> tuple[LLTokenizer, GrammarTrial]:
        known = Tokens.of(self._tokenizer, vocabulary=self._vocabulary, eos_token_ids=self._eos_token_ids)
        return known.load(), GrammarTrial(known)
