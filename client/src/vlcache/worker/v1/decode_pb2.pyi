from vlcache.v1 import inference_pb2 as _inference_pb2
from vlcache.worker.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReserveRequest(_message.Message):
    __slots__ = ("request_id", "attempt", "model", "compatibility", "kept_tokens_bound", "max_new_tokens", "prefill_epoch", "arena_socket", "epoch", "answers", "copies")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    COMPATIBILITY_FIELD_NUMBER: _ClassVar[int]
    KEPT_TOKENS_BOUND_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_EPOCH_FIELD_NUMBER: _ClassVar[int]
    ARENA_SOCKET_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    model: str
    compatibility: str
    kept_tokens_bound: int
    max_new_tokens: int
    prefill_epoch: str
    arena_socket: str
    epoch: str
    answers: _containers.RepeatedCompositeFieldContainer[ReservedAnswer]
    copies: bool
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., model: _Optional[str] = ..., compatibility: _Optional[str] = ..., kept_tokens_bound: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., prefill_epoch: _Optional[str] = ..., arena_socket: _Optional[str] = ..., epoch: _Optional[str] = ..., answers: _Optional[_Iterable[_Union[ReservedAnswer, _Mapping]]] = ..., copies: bool = ...) -> None: ...

class ReservedAnswer(_message.Message):
    __slots__ = ("choice", "delivered_tokens")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    DELIVERED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    choice: int
    delivered_tokens: int
    def __init__(self, choice: _Optional[int] = ..., delivered_tokens: _Optional[int] = ...) -> None: ...

class ReserveResponse(_message.Message):
    __slots__ = ("token", "transport", "reserved_bytes", "lease_s", "promised_tokens")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    PROMISED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    transport: str
    reserved_bytes: int
    lease_s: float
    promised_tokens: int
    def __init__(self, token: _Optional[bytes] = ..., transport: _Optional[str] = ..., reserved_bytes: _Optional[int] = ..., lease_s: _Optional[float] = ..., promised_tokens: _Optional[int] = ...) -> None: ...

class GrowReservationRequest(_message.Message):
    __slots__ = ("token", "kept_tokens_bound")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    KEPT_TOKENS_BOUND_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    kept_tokens_bound: int
    def __init__(self, token: _Optional[bytes] = ..., kept_tokens_bound: _Optional[int] = ...) -> None: ...

class GrowReservationResponse(_message.Message):
    __slots__ = ("reserved_bytes",)
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    reserved_bytes: int
    def __init__(self, reserved_bytes: _Optional[int] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("token",)
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    def __init__(self, token: _Optional[bytes] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("lease_s",)
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    lease_s: float
    def __init__(self, lease_s: _Optional[float] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("token",)
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    def __init__(self, token: _Optional[bytes] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TokenStreamRequest(_message.Message):
    __slots__ = ("attach", "cancel")
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    attach: Attach
    cancel: Cancel
    def __init__(self, attach: _Optional[_Union[Attach, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ...) -> None: ...

class Attach(_message.Message):
    __slots__ = ("handle", "token", "delivered", "choice")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    DELIVERED_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    token: bytes
    delivered: _containers.RepeatedScalarFieldContainer[int]
    choice: int
    def __init__(self, handle: _Optional[int] = ..., token: _Optional[bytes] = ..., delivered: _Optional[_Iterable[int]] = ..., choice: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    def __init__(self, handle: _Optional[int] = ...) -> None: ...

class TokenStreamResponse(_message.Message):
    __slots__ = ("updates", "draining")
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    updates: _containers.RepeatedCompositeFieldContainer[SequenceUpdate]
    draining: bool
    def __init__(self, updates: _Optional[_Iterable[_Union[SequenceUpdate, _Mapping]]] = ..., draining: bool = ...) -> None: ...

class SequenceUpdate(_message.Message):
    __slots__ = ("handle", "token_ids", "text", "finish_reason", "error", "logprobs")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    handle: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    finish_reason: _inference_pb2.FinishReason
    error: SequenceError
    logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenLogprobs]
    def __init__(self, handle: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., finish_reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ..., error: _Optional[_Union[SequenceError, _Mapping]] = ..., logprobs: _Optional[_Iterable[_Union[_inference_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...

class SequenceError(_message.Message):
    __slots__ = ("code", "reason", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: str
    message: str
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...
