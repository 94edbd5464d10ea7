"""What a request asks for of compression: budget, guard and wire, read by router and workers alike."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace
from fractions import Fraction

from vlcache.v1 import inference_pb2 as pb

from shared.errors import InvalidRequestError

# Floors of any compression policy: a layer may always keep this share of the prompt, and this many tokens.
FLOOR_SHARE = Fraction(1, 100)
MIN_KEPT_TOKENS = 16
# Bits of a quantised value; 0 quantises nothing.
WIRE_BITS = (0, 8, 4, 2)
# Fewest and most values that share a scale: below, the scales outweigh what they save.
WIRE_GROUPS = (8, 256)


class BudgetScope(enum.Enum):
    """What a budget is a share of: the whole prompt's KV, or that of its visual tokens, all text being kept."""

    CACHE = "cache"
    VISUAL = "visual"

    @classmethod
    def from_proto(cls, value: pb.BudgetScope) -> BudgetScope:
        """Reads and checks a value of the contract.

        Raises:
            InvalidRequestError: It is none of them.
        """
        scope = _SCOPES.get(value)
        if scope is None:
            raise InvalidRequestError(f"budget_scope is CACHE or VISUAL, not {value}")
        return scope


_SCOPES = {
    pb.BUDGET_SCOPE_UNSPECIFIED: BudgetScope.CACHE,
    pb.BUDGET_SCOPE_CACHE: BudgetScope.CACHE,
    pb.BUDGET_SCOPE_VISUAL: BudgetScope.VISUAL,
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much of the prompt's KV, or of its visual tokens', is kept: a share in (0, 1] or a token count per layer."""

    retention: float | None = None
    max_kept_tokens: int | None = None
    scope: BudgetScope = BudgetScope.CACHE

    def __post_init__(self) -> None:
        if self.retention is not None:
            ok = math.isfinite(self.retention) and 0 < self.retention <= 1
            _require(ok, f"retention is the kept share and must lie in (0, 1], not {self.retention}")
        if self.max_kept_tokens is not None:
            _require(self.max_kept_tokens >= 1, f"max_kept_tokens must be at least 1, not {self.max_kept_tokens}")

    @classmethod
    def from_proto(cls, message: pb.CompressionParams, *, default_retention: float) -> Budget:
        """Reads and checks a message.

        Raises:
            InvalidRequestError: A value is out of its range.
        """
        kind, scope = message.WhichOneof("budget"), BudgetScope.from_proto(message.budget_scope)
        if kind == "max_kept_tokens":
            return cls(max_kept_tokens=message.max_kept_tokens, scope=scope)
        return cls(retention=message.retention if kind == "retention" else default_retention, scope=scope)

    def write_to(self, message: pb.CompressionParams) -> None:
        """Makes this the budget of a message of the same scope."""
        if self.max_kept_tokens is not None:
            message.max_kept_tokens = self.max_kept_tokens
        elif self.retention is not None:
            message.retention = self.retention

    def lowered(self, share: Fraction) -> Budget:
        """The budget that keeps `share` of this one, rounded down to whole tokens where it is a count."""
        if self.max_kept_tokens is not None:
            return replace(self, max_kept_tokens=int(self.max_kept_tokens * share))
        return replace(self, retention=float(Fraction(str(self.retention)) * share))

    def tokens_of(self, text_tokens: int, visual_tokens: int) -> int:
        """How many of a prompt's tokens are in its scope."""
        return visual_tokens + (text_tokens if self.scope is BudgetScope.CACHE else 0)

    def retention_of(self, text_tokens: int, visual_tokens: int) -> Fraction:
        """The retention that this budget means for a prompt; 1 where nothing is in its scope."""
        tokens = self.tokens_of(text_tokens, visual_tokens)
        return self.share_of(tokens) if tokens else Fraction(1)

    def share_of(self, num_tokens: int) -> Fraction:
        """The retention that this budget means for `num_tokens`, those of its scope.

        Exact: 0.29 means 29/100, not its binary neighbour, so that rounding down never loses a token.
        """
        if self.max_kept_tokens is not None:
            return min(Fraction(1), Fraction(self.max_kept_tokens, num_tokens))
        return Fraction(str(self.retention))

    def kept_tokens_bound(self, text_tokens: int, visual_tokens: int) -> int:
        """Upper bound of the mean number of kept tokens per layer, given upper bounds of the prompt's.

        Every policy stays below it: whatever it gives a layer beyond its share is at most the floor.
        """
        if self.scope is BudgetScope.CACHE:
            return self._bound(text_tokens + visual_tokens)
        return text_tokens + (self._bound(visual_tokens) if visual_tokens else 0)

    def _bound(self, num_tokens: int) -> int:
        floor = max(math.ceil(num_tokens * FLOOR_SHARE), MIN_KEPT_TOKENS)
        return min(num_tokens, math.ceil(self.share_of(num_tokens) * num_tokens) + floor)


@dataclass(frozen=True, kw_only=True)
class Wire:
    """How kept KV is written for its way to the decode worker, which restores its plain form.

    `bits` per value, 0 for values as they are. `key_channels` is the kept share of each KV head's K channels, in
    (0, 1]. `group` tokens (K) or channels (V) share a scale. The last `residual` kept tokens stay as they are.
    """

    bits: int = 0
    key_channels: float = 1.0
    group: int = 32
    residual: int = 32

    def __post_init__(self) -> None:
        _require(self.bits in WIRE_BITS, f"wire.bits is one of {', '.join(map(str, WIRE_BITS))}, not {self.bits}")
        ok = math.isfinite(self.key_channels) and 0 < self.key_channels <= 1
        _require(ok, f"wire.key_channels is the kept share and must lie in (0, 1], not {self.key_channels}")
        fewest, most = WIRE_GROUPS
        _require(fewest <= self.group <= most, f"wire.group must lie in [{fewest}, {most}], not {self.group}")
        _require(self.residual >= 0, f"wire.residual must not be negative, not {self.residual}")

    @classmethod
    def from_proto(cls, message: pb.WireParams) -> Wire:
        """Reads and checks a message.

        Raises:
            InvalidRequestError: A value is out of its range.
        """
        default, has = cls(), message.HasField
        return cls(
            bits=message.bits,
            key_channels=message.key_channels or default.key_channels,
            group=message.group if has("group") else default.group,
            residual=message.residual if has("residual") else default.residual,
        )

    @property
    def plain(self) -> bool:
        """Whether everything is sent as it is."""
        return self.bits == 0 and self.key_channels == 1


@dataclass(frozen=True, kw_only=True)
class Guard:
    """When more is kept than the budget says.

    `max_dropped_attention`, in [0, 1], is the largest weight that one of an answer's first tokens may give a dropped
    token, mean over layers; 1 is off.
    """

    max_dropped_attention: float = 1.0

    def __post_init__(self) -> None:
        limit = self.max_dropped_attention
        _require(0 <= limit <= 1, f"max_dropped_attention is a weight and must lie in [0, 1], not {limit}")

    @classmethod
    def from_proto(cls, message: pb.CompressionParams, *, default: float) -> Guard:
        """Reads and checks a message.

        Raises:
            InvalidRequestError: The limit is out of its range.
        """
        given = message.HasField("max_dropped_attention")
        return cls(max_dropped_attention=message.max_dropped_attention if given else default)

    @property
    def on(self) -> bool:
        """Whether anything is guarded."""
        return self.max_dropped_attention < 1


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidRequestError(message)
