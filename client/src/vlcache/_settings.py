"""What a caller chooses: time limits, retries, sampling and compression. Values only, checked when made."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vlcache.v1 import inference_pb2

MAX_SEED = 2**64 - 1
MAX_TOKEN_ID = 2**32 - 1
MAX_REPETITION_PENALTY = 10
MAX_ANSWERS = 16
MAX_LOGPROBS = 20
MAX_CONSTRAINT_BYTES = 64 << 10
MAX_RESIDUAL = 2**32 - 1
BudgetScope = Literal["cache", "visual"]
# the server's default is the cache: what is left out stays absent on the wire
_SCOPES = {
    "cache": inference_pb2.BUDGET_SCOPE_UNSPECIFIED,
    "visual": inference_pb2.BUDGET_SCOPE_VISUAL,
}


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _is_positive(seconds: float) -> bool:
    return 0 < seconds < math.inf


@dataclass(frozen=True, kw_only=True)
class Timeout:
    """How long a client waits.

    connect_s: seconds that one attempt to connect may take, name resolution apart.
    first_token_s: seconds from sending to the first token, all attempts together; None sets no such limit.
    total_s: seconds that a whole call may take, all attempts together. The server sees what is left of it as
        the deadline of the RPC.

    Raises ValueError when a limit is not a positive, finite number.
    """

    connect_s: float = 5.0
    first_token_s: float | None = None
    total_s: float = 600.0

    def __post_init__(self) -> None:
        _check(_is_positive(self.connect_s), f"connect_s must be positive, got {self.connect_s}")
        _check(_is_positive(self.total_s), f"total_s must be positive, got {self.total_s}")
        _check(
            self.first_token_s is None or _is_positive(self.first_token_s),
            f"first_token_s must be positive or None, got {self.first_token_s}",
        )


@dataclass(frozen=True, kw_only=True)
class Tls:
    """How the service is known, and how it knows the client: PEM files, read when a client is made.

    ca: certificates of the CAs that may vouch for the service; those that gRPC trusts when None.
    cert, key: the client's own certificate and its key, where the service demands one.

    Raises ValueError when only one of cert and key is given.
    """

    ca: str | os.PathLike[str] | None = None
    cert: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        _check((self.cert is None) == (self.key is None), "cert and key belong together: give both or none")


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """When a failed call is sent again. Only errors that say `retryable` are, and only before the first event.

    max_attempts: attempts in all; 1 never retries.
    initial_backoff_s: seconds before the second attempt.
    max_backoff_s: the longest backoff in seconds; a longer wait that the server asks for is still respected.
    multiplier: growth of the backoff from one attempt to the next.
    jitter: share of each backoff, in [0, 1], that is drawn at random, so that clients do not return together.

    Raises ValueError when a value is out of its range.
    """

    max_attempts: int = 4
    initial_backoff_s: float = 0.2
    max_backoff_s: float = 5.0
    multiplier: float = 2.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        _check(self.max_attempts >= 1, f"max_attempts must be at least 1, got {self.max_attempts}")
        _check(
            _is_positive(self.initial_backoff_s),
            f"initial_backoff_s must be positive, got {self.initial_backoff_s}",
        )
        _check(
            self.initial_backoff_s <= self.max_backoff_s < math.inf,
            f"max_backoff_s must be finite and at least initial_backoff_s, got {self.max_backoff_s}",
        )
        _check(1 <= self.multiplier < math.inf, f"multiplier must be at least 1, got {self.multiplier}")
        _check(0 <= self.jitter <= 1, f"jitter must be in [0, 1], got {self.jitter}")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. None leaves a choice to the server.

    max_new_tokens: tokens to generate at most.
    temperature: 0 is greedy (the server's default).
    top_p: keep the smallest set of tokens whose probability reaches top_p, in (0, 1].
    top_k: keep the top_k most likely tokens; 0 keeps all.
    seed: 64-bit seed; the same seed and prompt give the same answer.
    stop: generation ends before the first occurrence of any of these.
    ignore_eos: go on after the end-of-sequence token.
    presence_penalty: subtracted from the logits of tokens that the answer has, in [-2, 2].
    frequency_penalty: the same, once for every time that the answer has the token.
    repetition_penalty: logits of tokens that prompt or answer have are divided by it, or multiplied where they are
        negative, in (0, 10].
    logit_bias: added to the logits of tokens by their ids, each in [-100, 100].
    min_new_tokens: the answer does not end by itself with fewer tokens.
    logprobs: report log-probabilities: of each token, and of so many most likely ones in its place, at most 20.
    json_schema: the answer is a JSON value that this schema, a text or a dict, allows.
    regex: the whole answer matches this regular expression.
    grammar: the answer is a sentence of this grammar, in the notation of Lark.
    choices: the answer is one of these texts.

    At most one of the last four is given. An answer that max_new_tokens or a stop string ends may be cut short.
    n: answers to draw from one prompt, at most 16; the first is the one that is drawn alone.

    Raises ValueError when a value is out of its range.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_new_tokens: int = 0
    logprobs: int | None = None
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    choices: Sequence[str] | None = None
    n: int = 1

    def __post_init__(self) -> None:
        _check(
            self.max_new_tokens is None or self.max_new_tokens >= 1,
            f"max_new_tokens must be at least 1, got {self.max_new_tokens}",
        )
        _check(
            self.temperature is None or 0 <= self.temperature < math.inf,
            f"temperature must be finite and not negative, got {self.temperature}",
        )
        _check(self.top_p is None or 0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        _check(self.top_k is None or self.top_k >= 0, f"top_k must not be negative, got {self.top_k}")
        _check(self.seed is None or 0 <= self.seed <= MAX_SEED, f"seed must fit 64 bits, got {self.seed}")
        # A lone string is a sequence of characters too: each of them would stop the generation.
        _check(not isinstance(self.stop, str), "stop must be a tuple of strings, got one string")
        _check(all(self.stop), "stop strings must not be empty")
        self._check_changes()
        self._check_constraint()

    def _check_constraint(self) -> None:
        given = [name for name in ("json_schema", "regex", "grammar", "choices") if getattr(self, name) is not None]
        _check(len(given) <= 1, f"give at most one of json_schema, regex, grammar and choices, got {', '.join(given)}")
        # a lone string would be a choice between its characters
        _check(not isinstance(self.choices, str), "choices must be a sequence of strings, got one string")
        _check(self.choices is None or (len(self.choices) > 0 and all(self.choices)), "choices must be texts")
        kind, text = self._constraint or ("", "-")
        _check(0 < len(text.encode()) <= MAX_CONSTRAINT_BYTES, f"{kind} has 1 to {MAX_CONSTRAINT_BYTES} bytes")
        if kind == "json_schema":
            _check_schema(text)

    @property
    def _constraint(self) -> tuple[str, str] | None:
        """The field of the contract, and what is in it."""
        if self.json_schema is not None:
            schema = self.json_schema
            return "json_schema", schema if isinstance(schema, str) else json.dumps(schema)
        if self.choices is not None:
            return "regex", "|".join(map(_literal, self.choices))
        if self.regex is not None:
            return "regex", self.regex
        return None if self.grammar is None else ("grammar", self.grammar)

    def _check_changes(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            _check(-2 <= getattr(self, name) <= 2, f"{name} must be in [-2, 2], got {getattr(self, name)}")
        _check(
            0 < self.repetition_penalty <= MAX_REPETITION_PENALTY,
            f"repetition_penalty must be in (0, {MAX_REPETITION_PENALTY}], got {self.repetition_penalty}",
        )
        for token, bias in self.logit_bias.items():
            _check(0 <= token <= MAX_TOKEN_ID and -100 <= bias <= 100, f"logit_bias must be in [-100, 100], got {bias}")
        _check(self.min_new_tokens >= 0, f"min_new_tokens must not be negative, got {self.min_new_tokens}")
        _check(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            f"logprobs must be in [0, {MAX_LOGPROBS}], got {self.logprobs}",
        )
        _check(1 <= self.n <= MAX_ANSWERS, f"n must be in [1, {MAX_ANSWERS}], got {self.n}")

    def to_proto(self) -> inference_pb2.SamplingParams:
        """The message of the contract; fields left None stay absent."""
        return inference_pb2.SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=None if self.repetition_penalty == 1 else self.repetition_penalty,
            logit_bias=self.logit_bias,
            min_new_tokens=self.min_new_tokens,
            logprobs=self.logprobs,
            constraint=inference_pb2.Constraint(**dict([self._constraint])) if self._constraint else None,
            n=0 if self.n == 1 else self.n,
        )


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"json_schema is no JSON: {error}") from error
    _check(isinstance(schema, dict), "json_schema must be a JSON object")


def _literal(text: str) -> str:
    """The regular expression of one text: whatever could mean more, or end a line, stands there as its number."""
    return "".join(char if char.isalnum() or char in " _" or char > "\x7f" else f"\\x{ord(char):02x}" for char in text)


@dataclass(frozen=True, kw_only=True)
class Wire:
    """How what is kept is written for its way to the decode worker, which restores it.

    Fewer bytes travel; the decode worker stores as many as without. `Transferred.sent_bytes` says how many were sent.

    bits: 8, 4 or 2 per value, quantised; 0 leaves values as they are.
    key_channels: kept share of the K channels of each KV head, in (0, 1]; the others become zeros.
    group: tokens (K) or channels (V) that share a scale, 8 to 256; the server's default (32) when None.
    residual: last kept tokens of each KV head that stay as they are; the server's default (32) when None.

    Raises ValueError when a value is out of its range.
    """

    bits: int = 0
    key_channels: float = 1.0
    group: int | None = None
    residual: int | None = None

    def __post_init__(self) -> None:
        _check(self.bits in (0, 8, 4, 2), f"bits must be one of 0, 8, 4, 2, got {self.bits}")
        _check(0 < self.key_channels <= 1, f"key_channels must be in (0, 1], got {self.key_channels}")
        _check(self.group is None or 8 <= self.group <= 256, f"group must be in [8, 256], got {self.group}")
        _check(
            self.residual is None or 0 <= self.residual <= MAX_RESIDUAL,
            f"residual must be in [0, {MAX_RESIDUAL}], got {self.residual}",
        )

    def to_proto(self) -> inference_pb2.WireParams:
        """The message of the contract; fields left None stay absent."""
        return inference_pb2.WireParams(
            bits=self.bits, key_channels=self.key_channels, group=self.group, residual=self.residual
        )


@dataclass(frozen=True, kw_only=True)
class Compression:
    """How much of the prompt's KV is kept, and who chooses it. What is left out is the server's default.

    policy: name of a compression policy; `Model.policies` lists them.
    retention: kept share of the prompt's KV, in (0, 1]; 1 keeps everything.
    max_kept_tokens: tokens kept per layer on average, instead of `retention`.
    budget_scope: what the budget is a share of: "cache", the whole prompt's KV, or "visual", that of the visual tokens,
        all text being kept.
    min_retention: share, in (0, 1], down to which the budget may be lowered rather than let the request wait while
        memory is short; 1 lowers nothing. `Compressed` says what was asked for and what was done.
    max_dropped_attention: the quality guard: the largest weight, in [0, 1], that one of the answer's first tokens may
        give a dropped token, mean over layers. Where it is larger, twice as much is kept, then everything, if there is
        memory for it; 1 is off. `Compressed.guard` says what was done.
    parameters: parameters of the policy by name, JSON values; the server refuses unknown names.
    wire: how what is kept is written for its way; as it is when None.
    explain: say which tokens were kept, in `Compressed.kept`.

    Raises ValueError when a value is out of its range or both budgets are given.
    """

    policy: str = ""
    retention: float | None = None
    max_kept_tokens: int | None = None
    budget_scope: BudgetScope = "cache"
    min_retention: float | None = None
    max_dropped_attention: float | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    wire: Wire | None = None
    explain: bool = False

    def __post_init__(self) -> None:
        _check(
            self.retention is None or self.max_kept_tokens is None,
            "retention and max_kept_tokens are two ways to set one budget: give one of them",
        )
        _check(
            self.retention is None or 0 < self.retention <= 1,
            f"retention must be in (0, 1], got {self.retention}",
        )
        _check(
            self.max_kept_tokens is None or self.max_kept_tokens >= 1,
            f"max_kept_tokens must be at least 1, got {self.max_kept_tokens}",
        )
        _check(
            self.min_retention is None or 0 < self.min_retention <= 1,
            f"min_retention must be in (0, 1], got {self.min_retention}",
        )
        _check(
            self.max_dropped_attention is None or 0 <= self.max_dropped_attention <= 1,
            f"max_dropped_attention must be in [0, 1], got {self.max_dropped_attention}",
        )
        _check(
            self.budget_scope in _SCOPES, f"budget_scope must be one of {', '.join(_SCOPES)}, got {self.budget_scope!r}"
        )

    def to_proto(self) -> inference_pb2.CompressionParams:
        """The message of the contract. Raises ValueError when a parameter is not a JSON value."""
        params = inference_pb2.CompressionParams(
            policy=self.policy,
            retention=self.retention,
            max_kept_tokens=self.max_kept_tokens,
            budget_scope=_SCOPES[self.budget_scope],
            wire=None if self.wire is None else self.wire.to_proto(),
            min_retention=self.min_retention,
            max_dropped_attention=self.max_dropped_attention,
            explain=self.explain,
        )
        params.parameters.update(self.parameters)
        return params
