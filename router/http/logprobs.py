"""Log-probabilities in OpenAI's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlcache.v1 import inference_pb2 as pb

# What stands for a part of a character, whose bytes nobody can tell from it.
REPLACEMENT = "\ufffd"
# JSON knows no infinity; OpenAI's word for a token that cannot be.
LEAST = -9999.0


def logprobs_json(given: Sequence[pb.TokenLogprobs]) -> dict[str, Any] | None:
    """The `logprobs` of a choice; None where the request wants none."""
    if not given:
        return None
    content = [_token(each.token) | {"top_logprobs": [_token(other) for other in each.top]} for each in given]
    return {"content": content, "refusal": None}


def _token(given: pb.TokenLogprob) -> dict[str, Any]:
    encoded = None if REPLACEMENT in given.text else list(given.text.encode())
    return {"token": given.text, "logprob": max(LEAST, given.logprob), "bytes": encoded}
