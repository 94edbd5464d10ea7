"""Constraints as a model's tokens see them: compiled once by llguidance, followed by each answer.

Free of torch, so that the process that tries grammars (`grammar_process.py`) is small.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # a name of its stubs alone

from shared.errors import InvalidRequestError
from shared.request.constraint import REASON, Constraint

# What a grammar may cost while it is followed. A mask is computed between two steps of everybody's batch, so it ends
# after some milliseconds; a state of the lexer takes one or two KiB, in each answer.
LIMITS = LLParserLimits(
    initial_lexer_fuel=250_000,
    step_max_items=20_000,
    max_lexer_states=30_000,
    verbose_errors=False,
)
# Whitespace between the parts of a JSON value: none, a space, or a line break with indentation. Never more: a model
# that has nothing to say could go on with it for ever.
JSON_DEFAULTS: JsonCompileOptions = {"whitespace_pattern": r"( |\n {0,16})?"}
# A keyword that is not understood is refused, whatever the schema says.
JSON_OVERRIDES: JsonCompileOptions = {"lenient": False}
MAX_REASON_CHARS = 300

Mask: TypeAlias = "np.ndarray[Any, np.dtype[np.bool_]]"


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a matcher must know of a model: its tokenizer in the JSON of `tokenizers`, and how many logits it has.

    `eos_token_ids` empty means the tokenizer's own.
    """

    tokenizer: str
    vocabulary: int
    eos_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, *, vocabulary: int, eos_token_ids: Collection[int]) -> Tokens:
        """Those of a transformers tokenizer.

        Raises:
            InvalidRequestError: It is not one of `tokenizers`.
        """
        backend = copy.copy(getattr(tokenizer, "backend_tokenizer", None))
        if backend is None:
            raise _unsupported()
        backend.no_padding()
        backend.no_truncation()
        # a tokenizer may know more tokens than the model has logits for, or fewer: vocabularies are padded
        size = max(vocabulary, backend.get_vocab_size(with_added_tokens=True))
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        return cls(tokenizer=backend.to_str(), vocabulary=size, eos_token_ids=tuple(sorted(eos_token_ids)) or own)

    def load(self) -> LLTokenizer:
        """For a vocabulary of 150,000 tokens this takes a second.

        Raises:
            InvalidRequestError: The library cannot tell which bytes its tokens are.
        """
        try:
            return LLTokenizer(self.tokenizer, n_vocab=self.vocabulary, eos_token=list(self.eos_token_ids) or None)
        except ValueError as error:
            raise _unsupported() from error


class Matcher:
    """How far one answer has come in its grammar. A function of the answer's tokens."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def ended(self) -> bool:
        """Whether nothing can follow what was pushed."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def push(self, token: int) -> None:
        """The answer goes on with `token`; one that the grammar does not allow there shows in `check`."""
        self._matcher.consume_token(token)

    def check(self) -> None:
        """Looks whether the answer follows its grammar.

        Raises:
            InvalidRequestError: It does not, or that has become too costly to tell; for good.
        """
        if self._matcher.is_error():
            raise _left(_reason(self._matcher.get_error()))

    def allowed(self, vocabulary: int) -> Mask:
        """Which of so many tokens may follow, [vocabulary]; those that end the answer only where it may end.

        Raises:
            InvalidRequestError: See `check`; or none may.
        """
        self.check()
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self.check()
        found = np.zeros(vocabulary, dtype=np.bool_)
        known = np.unpackbits(bits, count=min(vocabulary, 8 * len(bits)), bitorder="little")
        found[: len(known)] = known
        if not found.any():
            raise _left(_reason(""))
        return found


class Grammar:
    """A compiled constraint; immutable."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @classmethod
    def compile(cls, constraint: Constraint, tokens: LLTokenizer) -> Grammar:
        """Compiles a constraint that some answer meets; lets go of the GIL.

        Raises:
            InvalidRequestError: It is none, asks for what is not implemented, or is too complex.
        """
        matcher = LLMatcher(tokens, _notation(constraint), log_level=0, limits=LIMITS)
        # a grammar that is too complex for its first token shows here, before anything is spent on its answer
        found = not matcher.is_error() and any(matcher.compute_bitmask())
        if not found or matcher.is_error():
            raise _refused(constraint, _reason(matcher.get_error()))
        return cls(matcher)

    def matcher(self) -> Matcher:
        """Of an answer without tokens."""
        return Matcher(self._matcher.deep_copy())


def _notation(constraint: Constraint) -> str:
    """What the library takes."""
    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(constraint.text)
    if constraint.kind == "grammar":
        return LLMatcher.grammar_from_lark(constraint.text)
    try:
        return LLMatcher.grammar_from_json_schema(constraint.text, defaults=JSON_DEFAULTS, overrides=JSON_OVERRIDES)
    except ValueError as error:
        # Python's reader takes what is no JSON: NaN, for one
        raise _refused(constraint, _reason(str(error))) from error


def _reason(error: str) -> str:
    """The sentence of a report in which the library also draws, and says where it was in its own notation."""
    if not error or error.startswith("NoExtension"):
        return "this model can say nothing that meets it"
    named = re.search(r"^error: (.+)$", error, re.MULTILINE)
    first = error.split("\n", 1)[0]
    reason = named.group(1) if named else re.sub(r"^at \d+\(\d+\): ", "", first)
    return reason[:MAX_REASON_CHARS]


def _refused(constraint: Constraint, why: str) -> InvalidRequestError:
    return InvalidRequestError(f"{constraint.kind} cannot be followed: {why}", reason=REASON)


def _left(why: str) -> InvalidRequestError:
    return InvalidRequestError(f"the answer cannot follow its constraint: {why}", reason=REASON)


def _unsupported() -> InvalidRequestError:
    return InvalidRequestError("this model's tokenizer knows no constraints", reason=REASON)


def tokens_to_json(tokens: Tokens) -> str:
    """One line, for the process that tries grammars."""
    return json.dumps([tokens.tokenizer, tokens.vocabulary, tokens.eos_token_ids])


def tokens_from_json(line: str) -> Tokens:
    """What `tokens_to_json` wrote."""
    tokenizer, vocabulary, eos_token_ids = json.loads(line)
    return Tokens(tokenizer=tokenizer, vocabulary=vocabulary, eos_token_ids=tuple(eos_token_ids))
