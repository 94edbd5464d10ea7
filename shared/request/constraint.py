"""The form that an answer must have: what of it can be checked without a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from vlcache.v1 import inference_pb2 as pb

from shared.errors import InvalidRequestError

Kind = Literal["json_schema", "regex", "grammar"]
# How much text a constraint has at most, bytes: what a matcher costs grows faster than its text.
MAX_BYTES: dict[Kind, int] = {"json_schema": 64 << 10, "regex": 16 << 10, "grammar": 64 << 10}
REASON = "CONSTRAINT"


@dataclass(frozen=True)
class Constraint:
    """A JSON schema, a regular expression, or a grammar in the notation of Lark.

    Whether it means anything is known to whoever compiles it (`shared/model/grammar.py`).
    """

    kind: Kind
    text: str

    def __post_init__(self) -> None:
        limit = MAX_BYTES[self.kind]
        size = len(self.text.encode())
        _require(0 < size <= limit, f"{self.kind} has 1 to {limit} bytes, not {size}")
        if self.kind == "json_schema":
            _check_schema(self.text)

    @classmethod
    def from_proto(cls, message: pb.Constraint) -> Constraint:
        """Reads and checks a message.

        Raises:
            InvalidRequestError: It says nothing, too much, or a schema that is no JSON object.
        """
        kind = message.WhichOneof("kind")
        if kind is None:
            raise InvalidRequestError("a constraint is a json_schema, a regex or a grammar", reason=REASON)
        return cls(kind, getattr(message, kind))

    def to_proto(self) -> pb.Constraint:
        """The message that reads back as this value."""
        return pb.Constraint(**{self.kind: self.text})


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text)
    except RecursionError as error:
        raise InvalidRequestError("json_schema is nested too deeply", reason=REASON) from error
    except ValueError as error:
        raise InvalidRequestError(f"json_schema is no JSON: {error}", reason=REASON) from error
    _require(isinstance(schema, dict), "json_schema must be a JSON object")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidRequestError(message, reason=REASON)
