"""A scripted service: each attempt of `Generate` plays the next list of steps."""

# The contract names the methods.
# ruff: noqa: N802

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from vlcache.v1 import inference_pb2 as pb
from vlcache.v1 import inference_pb2_grpc

Step = pb.GenerateResponse | Callable[[grpc.ServicerContext], None]


def started(request_id: str = "r1") -> pb.GenerateResponse:
    return pb.GenerateResponse(started=pb.Started(request_id=request_id, model="shapes-vlm"))


def delta(text: str, *token_ids: int, reason: pb.FinishReason = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(text=text, token_ids=token_ids, finish_reason=reason))


def compression() -> pb.GenerateResponse:
    return pb.GenerateResponse(
        compression=pb.Compression(
            policy="vl_cache",
            requested_retention=0.1,
            realised_retention=0.125,
            full_bytes=2 * 2**20,
            kept_bytes=2**18,
            layer_tokens=[20, 12],
            layer_attention_mass=[0.5, 0.75],
            prompt_tokens=128,
            visual_tokens=100,
        )
    )


def transfer() -> pb.GenerateResponse:
    return pb.GenerateResponse(transfer=pb.Transfer(transport="memory", sent_bytes=300_000, seconds=0.002))


def finished(generated_tokens: int = 3) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        finished=pb.Finished(
            usage=pb.Usage(prompt_tokens=128, visual_tokens=100, generated_tokens=generated_tokens),
            seed=2**63 + 1,
            placement=pb.Placement(prefill_worker="p0", decode_worker="d0"),
        )
    )


def whole_answer() -> list[Step]:
    last = delta(" dot", 7, reason=pb.FINISH_REASON_STOP)
    return [started(), delta("a ", 5), compression(), transfer(), delta("red", 6), last, finished()]


def status_details(
    code: grpc.StatusCode, *, reason: str = "", retry_after_s: float | None = None, **metadata: str
) -> bytes:
    """The bytes of `grpc-status-details-bin`."""
    status = status_pb2.Status(code=code.value[0])
    info = error_details_pb2.ErrorInfo(reason=reason, domain="vlcache", metadata=metadata)
    details = [info]
    if retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status.SerializeToString()


def fail(code: grpc.StatusCode, message: str = "no", **details: str | float) -> Step:
    """A step that ends the RPC with an error; `details` are those of `status_details`."""

    def step(context: grpc.ServicerContext) -> None:
        if details:
            context.set_trailing_metadata((("grpc-status-details-bin", status_details(code, **details)),))
        context.abort(code, message)

    return step


def pause(seconds: float) -> Step:
    return lambda context: time.sleep(seconds)


class ScriptedService(inference_pb2_grpc.InferenceServiceServicer):
    """Plays scripts and remembers what it was asked. `attempts` is consumed from the front."""

    def __init__(self) -> None:
        self.address = ""
        self.attempts: list[Sequence[Step]] = []
        self.requests: list[pb.GenerateRequest] = []
        self.remaining_s: list[float] = []
        self.arrived_at: list[float] = []
        self.tenants: list[str | None] = []
        self.metadata: list[Sequence[tuple[str, str | bytes]]] = []
        self.asked = threading.Event()
        self.cancelled = threading.Event()
        self.models: list[Sequence[pb.Model] | grpc.StatusCode] = []
        self.info = pb.GetServerInfoResponse()

    def hang(self, context: grpc.ServicerContext) -> None:
        """A step that waits until the caller has gone."""
        self.cancelled.wait(10)

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        self.remaining_s.append(context.time_remaining())
        self.arrived_at.append(time.monotonic())
        self.metadata.append(tuple(context.invocation_metadata()))
        self.tenants.append(dict(context.invocation_metadata()).get("vlcache-tenant"))
        self.asked.set()
        steps = list(self.attempts.pop(0))
        # An RPC that ends with steps left was left by its caller (unless a step failed it).
        context.add_callback(lambda: self.cancelled.set() if steps else None)
        while steps:
            step = steps[0]
            if callable(step):
                step(context)
            else:
                yield step
            steps.pop(0)

    def ListModels(self, request: pb.ListModelsRequest, context: grpc.ServicerContext) -> pb.ListModelsResponse:
        answer = self.models.pop(0) if len(self.models) > 1 else self.models[0]
        if isinstance(answer, grpc.StatusCode):
            context.abort(answer, "no")
        return pb.ListModelsResponse(models=answer)

    def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
        return self.info


def serve(service: ScriptedService, address: str = "127.0.0.1:0") -> grpc.Server:
    """Starts it, on a free port by default; the caller stops it."""
    server = grpc.server(
        futures.ThreadPoolExecutor(max_workers=4),
        options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)],
    )
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
    service.address = f"127.0.0.1:{server.add_insecure_port(address)}"
    server.start()
    return server
