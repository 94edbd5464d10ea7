"""How the tokens of an answer are drawn, and when it ends; read by router and workers alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from vlcache.v1 import inference_pb2 as pb

from shared.errors import InvalidRequestError
from shared.request.constraint import Constraint

MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 256
MAX_LOGPROBS = 20
MAX_BIASED_TOKENS = 300
MAX_BIAS = 100.0
MAX_REPETITION_PENALTY = 10.0
MAX_ANSWERS = 16
# The golden ratio of 2^64: seeds of one request's answers, and of neighbouring requests', stay apart.
SEED_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn and when generation ends.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 keep every token. The random number of a step depends on
    (`seed`, position) alone. The penalties and `logit_bias`, pairs of a token id and what is added to its logit,
    change logits before all that (`shared/model/logits.py`). `logprobs` are how many most likely tokens are reported
    in each place; None reports nothing. What `constraint` does not allow is never drawn. `n` answers are drawn from one
    prompt; the seed is that of the first one.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_new_tokens: int = 0
    logprobs: int | None = None
    constraint: Constraint | None = None
    n: int = 1

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        _require(_within(self.temperature, 0, 100), f"temperature must lie in [0, 100], not {self.temperature}")
        _require(0 < self.top_p <= 1, f"top_p must lie in (0, 1], not {self.top_p}")
        _require(self.top_k >= 0, f"top_k must not be negative, not {self.top_k}")
        _require(len(self.stop) <= MAX_STOP_STRINGS, f"at most {MAX_STOP_STRINGS} stop strings are allowed")
        for text in self.stop:
            _require(0 < len(text.encode()) <= MAX_STOP_BYTES, f"a stop string has 1 to {MAX_STOP_BYTES} bytes")
        self._check_changes()
        _require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens must lie in [0, max_new_tokens], not {self.min_new_tokens}",
        )
        _require(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            f"logprobs must lie in [0, {MAX_LOGPROBS}], not {self.logprobs}",
        )
        _require(1 <= self.n <= MAX_ANSWERS, f"n must lie in [1, {MAX_ANSWERS}], not {self.n}")

    @classmethod
    def from_proto(cls, message: pb.SamplingParams, *, default_max_new_tokens: int) -> Sampling:
        """Reads and checks a message.

        Raises:
            InvalidRequestError: A value is out of its range.
        """
        has = message.HasField
        return cls(
            max_new_tokens=message.max_new_tokens if has("max_new_tokens") else default_max_new_tokens,
            temperature=message.temperature,
            top_p=message.top_p if has("top_p") else 1.0,
            top_k=message.top_k,
            seed=message.seed,
            stop=tuple(message.stop),
            ignore_eos=message.ignore_eos,
            presence_penalty=message.presence_penalty,
            frequency_penalty=message.frequency_penalty,
            repetition_penalty=message.repetition_penalty if has("repetition_penalty") else 1.0,
            logit_bias=tuple(sorted(message.logit_bias.items())),
            min_new_tokens=message.min_new_tokens,
            logprobs=message.logprobs if has("logprobs") else None,
            constraint=Constraint.from_proto(message.constraint) if has("constraint") else None,
            n=message.n or 1,
        )

    def to_proto(self) -> pb.SamplingParams:
        """The message that reads back as this value."""
        return pb.SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=dict(self.logit_bias),
            min_new_tokens=self.min_new_tokens,
            logprobs=self.logprobs,
            constraint=self.constraint.to_proto() if self.constraint else None,
            n=self.n,
        )

    def of_choice(self, choice: int) -> Sampling:
        """How one of the answers is drawn: as if it were alone, with a seed that follows from the request's."""
        return replace(self, seed=(self.seed + choice * SEED_STEP) % 2**64, n=1)

    @property
    def takes_highest(self) -> bool:
        """Whether the next token is the one of the highest logit, whatever was said before."""
        return self.temperature == 0 and not self.changes_logits and self.constraint is None

    @property
    def changes_logits(self) -> bool:
        """Whether logits are changed before a token is drawn, by more than a constraint."""
        return bool(self.counts_answer or self.reads_prompt or self.logit_bias or self.min_new_tokens)

    @property
    def counts_answer(self) -> bool:
        """Whether it matters how often the answer has a token."""
        return bool(self.presence_penalty or self.frequency_penalty)

    @property
    def reads_prompt(self) -> bool:
        """Whether it matters which tokens the prompt has."""
        return self.repetition_penalty != 1

    def check_vocabulary(self, vocabulary: int) -> None:
        """Refuses token ids that a model of so many does not have.

        Raises:
            InvalidRequestError: A biased token is none of them.
        """
        for token, _ in self.logit_bias:
            _require(token < vocabulary, f"logit_bias names token {token}, but there are only {vocabulary}")

    def _check_changes(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            _require(_within(getattr(self, name), -2, 2), f"{name} must lie in [-2, 2], not {getattr(self, name)}")
        _require(
            0 < self.repetition_penalty <= MAX_REPETITION_PENALTY,
            f"repetition_penalty must lie in (0, {MAX_REPETITION_PENALTY:g}], not {self.repetition_penalty}",
        )
        _require(len(self.logit_bias) <= MAX_BIASED_TOKENS, f"logit_bias has at most {MAX_BIASED_TOKENS} tokens")
        for token, bias in self.logit_bias:
            _require(_within(bias, -MAX_BIAS, MAX_BIAS), f"logit_bias of {token} must lie in [-100, 100], not {bias}")


def _within(value: float, least: float, most: float) -> bool:
    return math.isfinite(value) and least <= value <= most


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidRequestError(message)
