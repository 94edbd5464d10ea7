"""What a request took, as OpenAI's clients read it, and what compression saved."""

from __future__ import annotations

from typing import Any

from vlcache.v1 import inference_pb2 as pb

from router.http.kept import kept_json


class UsageReport:
    """Filled in by the events of one answer."""

    def __init__(self) -> None:
        self._kv: dict[str, Any] = {}
        self._kept: dict[str, Any] = {}
        self._usage = pb.Usage()

    def add(self, event: pb.GenerateResponse) -> None:
        """An event of the answer; most say nothing of this."""
        kind = event.WhichOneof("event")
        if kind == "compression":
            given = event.compression
            self._kv |= {
                "full_bytes": given.full_bytes,
                "kept_bytes": given.kept_bytes,
                "saved_bytes": max(0, given.full_bytes - given.kept_bytes),
                "retention": given.realised_retention,
                "policy": given.policy,
            }
            if given.HasField("kept"):
                self._kept = {"kept": kept_json(given)}
        elif kind == "transfer":
            self._kv |= {"sent_bytes": event.transfer.sent_bytes, "transport": event.transfer.transport}
        elif kind == "finished":
            self._usage = event.finished.usage

    def json(self) -> dict[str, Any]:
        """The `usage` of a complete answer; what is not known of the KV is null, as where the first token ended it.

        Which tokens were kept is there where the request said `explain` and the KV was handed over.
        """
        prompt, generated = self._usage.prompt_tokens, self._usage.generated_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"image_tokens": self._usage.visual_tokens},
            "kv": {name: self._kv.get(name) for name in KV} | self._kept,
        }


KV = ("full_bytes", "kept_bytes", "saved_bytes", "sent_bytes", "retention", "policy", "transport")
