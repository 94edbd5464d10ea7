"""What the service says about itself: its models, its workers and the KV bytes they hold."""

from dataclasses import dataclass

from vlcache.v1 import inference_pb2


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that at least one ready pair of workers serves.

    name: what to ask for.
    context_tokens: tokens of prompt and answer together.
    max_images: images per request at most.
    policies: names of the compression policies; default_policy is one of them.
    default_retention: kept share of the prompt's KV unless a request asks for another, in (0, 1].
    kv_bytes_per_token: bytes of KV that one token takes over all layers.
    """

    name: str
    context_tokens: int
    max_images: int
    policies: tuple[str, ...]
    default_policy: str
    default_retention: float
    kv_bytes_per_token: int


@dataclass(frozen=True, kw_only=True)
class KVBytes:
    """KV bytes of one worker by state.

    capacity: what it can hold.
    reserved: promised to requests whose prefill has not committed.
    filling: of parcels that are still arriving.
    active: of sequences that are being decoded.
    retained: of sent parcels, kept by a prefill worker to send them again if need be.
    """

    capacity: int
    reserved: int
    filling: int
    active: int
    retained: int


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A worker as the router sees it.

    name, role, address, model: who it is; the role is "prefill" or "decode".
    state: "ready", "draining" or "unreachable".
    requests_running, requests_waiting: its load.
    kv: the bytes of KV that it holds.
    """

    name: str
    role: str
    address: str
    state: str
    model: str
    requests_running: int
    requests_waiting: int
    kv: KVBytes


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over all requests since the router started, KV in bytes."""

    requests: int
    kv_full_bytes: int
    kv_kept_bytes: int
    kv_sent_bytes: int
    generated_tokens: int = 0

    @property
    def kv_saved_bytes(self) -> int:
        """Bytes of KV that compression spared decode memory."""
        return self.kv_full_bytes - self.kv_kept_bytes


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """Version of the service, its workers, and what compression has saved so far.

    requests_running: in flight at the router that was asked; requests_waiting: those of them that wait for memory.
    """

    version: str
    workers: tuple[Worker, ...]
    totals: Totals
    requests_running: int = 0
    requests_waiting: int = 0


def models_from_proto(response: inference_pb2.ListModelsResponse) -> tuple[Model, ...]:
    """The models of a response, in its order."""
    return tuple(_model(message) for message in response.models)


def server_info_from_proto(response: inference_pb2.GetServerInfoResponse) -> ServerInfo:
    """The whole response."""
    return ServerInfo(
        version=response.version,
        workers=tuple(_worker(message) for message in response.workers),
        totals=_totals(response.totals),
        requests_running=response.requests_running,
        requests_waiting=response.requests_waiting,
    )


def _model(message: inference_pb2.Model) -> Model:
    return Model(
        name=message.name,
        context_tokens=message.context_tokens,
        max_images=message.max_images,
        policies=tuple(message.policies),
        default_policy=message.default_policy,
        default_retention=message.default_retention,
        kv_bytes_per_token=message.kv_bytes_per_token,
    )


def _worker(message: inference_pb2.Worker) -> Worker:
    return Worker(
        name=message.name,
        role=message.role,
        address=message.address,
        state=message.state,
        model=message.model,
        requests_running=message.requests_running,
        requests_waiting=message.requests_waiting,
        kv=_kv_bytes(message.kv),
    )


def _kv_bytes(message: inference_pb2.KVBytes) -> KVBytes:
    return KVBytes(
        capacity=message.capacity,
        reserved=message.reserved,
        filling=message.filling,
        active=message.active,
        retained=message.retained,
    )


def _totals(message: inference_pb2.Totals) -> Totals:
    return Totals(
        requests=message.requests,
        kv_full_bytes=message.kv_full_bytes,
        kv_kept_bytes=message.kv_kept_bytes,
        kv_sent_bytes=message.kv_sent_bytes,
        generated_tokens=message.generated_tokens,
    )
