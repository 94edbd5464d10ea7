"""An answer as OpenAI's JSON: whole (`chat.completion`), or in chunks (`chat.completion.chunk`)."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vlcache.v1 import inference_pb2 as pb

from router.http.logprobs import logprobs_json
from router.http.usage import UsageReport

REASONS = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}


def _head(kind: str, started: pb.Started) -> dict[str, Any]:
    request = {"id": f"chatcmpl-{started.request_id}", "model": started.model}
    return {"object": kind, "created": int(time.time()), **request}


@dataclass
class _Choice:
    texts: list[str] = field(default_factory=list)
    logprobs: list[pb.TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None

    def json(self, index: int) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(self.texts), "refusal": None},
            "logprobs": logprobs_json(self.logprobs),
            "finish_reason": self.finish_reason,
        }


class Completion:
    """Gathers the events of an answer."""

    def __init__(self) -> None:
        self._choices: defaultdict[int, _Choice] = defaultdict(_Choice)
        self._usage = UsageReport()
        self._started = pb.Started()

    def add(self, event: pb.GenerateResponse) -> None:
        """The next event."""
        if event.HasField("started"):
            self._started = event.started
        elif event.HasField("delta"):
            choice = self._choices[event.delta.choice]
            choice.texts.append(event.delta.text)
            choice.logprobs.extend(event.delta.logprobs)
            choice.finish_reason = REASONS.get(event.delta.finish_reason)
        else:
            self._usage.add(event)

    def json(self) -> dict[str, Any]:
        """All of it, when its last event was added."""
        choices = [choice.json(index) for index, choice in sorted(self._choices.items())]
        return {**_head("chat.completion", self._started), "choices": choices, "usage": self._usage.json()}


class Chunks:
    """Turns the events of an answer into server-sent events."""

    def __init__(self, *, include_usage: bool) -> None:
        """Prepares.

        Args:
            include_usage: Whether a chunk without choices ends the answer with its usage; the others then say that
                they have none.
        """
        self._include_usage = include_usage
        self._usage = UsageReport()
        self._head: dict[str, Any] = {}
        self._begun: set[int] = set()

    def of(self, event: pb.GenerateResponse) -> Iterator[bytes]:
        """What `event` says to the client; nothing before its first token."""
        if event.HasField("delta"):
            delta = event.delta
            if delta.text or delta.logprobs or delta.finish_reason:
                yield self._chunk([self._choice(delta)], None)
        elif event.HasField("started"):
            self._head = _head("chat.completion.chunk", event.started)
        else:
            self._usage.add(event)
            if event.HasField("finished"):
                yield from self._end()

    def _choice(self, delta: pb.Delta) -> dict[str, Any]:
        said: dict[str, Any] = {"content": delta.text}
        if delta.choice not in self._begun:
            self._begun.add(delta.choice)
            said = {"role": "assistant", **said}
        return {
            "index": delta.choice,
            "delta": said,
            "logprobs": logprobs_json(delta.logprobs),
            "finish_reason": REASONS.get(delta.finish_reason),
        }

    def _end(self) -> Iterator[bytes]:
        if self._include_usage:
            yield self._chunk([], self._usage.json())
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        chunk = {**self._head, "choices": choices}
        return sse(chunk | {"usage": usage} if self._include_usage else chunk)


def sse(content: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
