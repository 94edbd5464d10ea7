"""Which model a worker serves, as it appears in manifests and worker reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlcache.worker.v1 import worker_pb2

from shared.kv.layout import KVLayout
from shared.model.loading import compatibility_hash
from shared.model.spec import VLMSpec


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """Two workers exchange KV only when `compatibility` is equal."""

    name: str
    compatibility: str
    layout: KVLayout
    context_tokens: int
    vocabulary: int

    @classmethod
    def of(cls, name: str, path: Path, spec: VLMSpec) -> ModelIdentity:
        """The identity of a checkpoint; an empty name becomes the checkpoint's."""
        return cls(
            name=name or path.resolve().name,
            compatibility=compatibility_hash(path, spec.layout),
            layout=spec.layout,
            context_tokens=spec.context_tokens,
            vocabulary=spec.vocabulary,
        )

    def to_proto(self) -> worker_pb2.ServedModel:
        """What a worker reports; the caller adds what only its role knows."""
        return worker_pb2.ServedModel(
            name=self.name,
            compatibility=self.compatibility,
            layout=self.layout.to_proto(),
            context_tokens=self.context_tokens,
        )
