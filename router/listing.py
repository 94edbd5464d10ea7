"""The models that can be asked now, as clients see them."""

from __future__ import annotations

from vlcache.v1 import inference_pb2 as pb

from router.workers.table import WorkerTable
from router.workers.worker import Worker


def served_models(table: WorkerTable) -> list[pb.Model]:
    """One per model that at least one ready pair of workers serves."""
    return [_model(worker) for worker in table.served_models().values()]


def _model(worker: Worker) -> pb.Model:
    served = worker.info.model
    return pb.Model(
        name=served.name,
        context_tokens=served.context_tokens,
        max_images=served.max_images,
        policies=served.policies,
        default_policy=served.default_policy,
        default_retention=served.default_retention,
        kv_bytes_per_token=worker.layout.token_bytes,
    )
