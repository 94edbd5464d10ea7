from vlcache.v1 import inference_pb2 as _inference_pb2
from vlcache.worker.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefillRequest(_message.Message):
    __slots__ = ("request", "attempt", "ticket", "epoch", "tenant", "parcel", "delivered")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PARCEL_FIELD_NUMBER: _ClassVar[int]
    DELIVERED_FIELD_NUMBER: _ClassVar[int]
    request: _inference_pb2.GenerateRequest
    attempt: int
    ticket: Ticket
    epoch: str
    tenant: str
    parcel: bytes
    delivered: _containers.RepeatedCompositeFieldContainer[DeliveredTokens]
    def __init__(self, request: _Optional[_Union[_inference_pb2.GenerateRequest, _Mapping]] = ..., attempt: _Optional[int] = ..., ticket: _Optional[_Union[Ticket, _Mapping]] = ..., epoch: _Optional[str] = ..., tenant: _Optional[str] = ..., parcel: _Optional[bytes] = ..., delivered: _Optional[_Iterable[_Union[DeliveredTokens, _Mapping]]] = ...) -> None: ...

class DeliveredTokens(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class Ticket(_message.Message):
    __slots__ = ("decode_worker", "decode_address", "token", "transport", "lease_s", "promised_tokens")
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    DECODE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    PROMISED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    decode_worker: str
    decode_address: str
    token: bytes
    transport: str
    lease_s: float
    promised_tokens: int
    def __init__(self, decode_worker: _Optional[str] = ..., decode_address: _Optional[str] = ..., token: _Optional[bytes] = ..., transport: _Optional[str] = ..., lease_s: _Optional[float] = ..., promised_tokens: _Optional[int] = ...) -> None: ...

class PrefillEvent(_message.Message):
    __slots__ = ("first_token", "compression", "transfer", "next_token", "retained")
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    NEXT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    RETAINED_FIELD_NUMBER: _ClassVar[int]
    first_token: FirstToken
    compression: _inference_pb2.Compression
    transfer: _inference_pb2.Transfer
    next_token: NextToken
    retained: Retained
    def __init__(self, first_token: _Optional[_Union[FirstToken, _Mapping]] = ..., compression: _Optional[_Union[_inference_pb2.Compression, _Mapping]] = ..., transfer: _Optional[_Union[_inference_pb2.Transfer, _Mapping]] = ..., next_token: _Optional[_Union[NextToken, _Mapping]] = ..., retained: _Optional[_Union[Retained, _Mapping]] = ...) -> None: ...

class Retained(_message.Message):
    __slots__ = ("lease_s",)
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    lease_s: float
    def __init__(self, lease_s: _Optional[float] = ...) -> None: ...

class ResendRequest(_message.Message):
    __slots__ = ("parcel", "attempt", "ticket")
    PARCEL_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    parcel: bytes
    attempt: int
    ticket: Ticket
    def __init__(self, parcel: _Optional[bytes] = ..., attempt: _Optional[int] = ..., ticket: _Optional[_Union[Ticket, _Mapping]] = ...) -> None: ...

class ResendResponse(_message.Message):
    __slots__ = ("transfer",)
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    transfer: _inference_pb2.Transfer
    def __init__(self, transfer: _Optional[_Union[_inference_pb2.Transfer, _Mapping]] = ...) -> None: ...

class RenewParcelsRequest(_message.Message):
    __slots__ = ("parcels",)
    PARCELS_FIELD_NUMBER: _ClassVar[int]
    parcels: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, parcels: _Optional[_Iterable[bytes]] = ...) -> None: ...

class RenewParcelsResponse(_message.Message):
    __slots__ = ("gone",)
    GONE_FIELD_NUMBER: _ClassVar[int]
    gone: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, gone: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ReleaseParcelsRequest(_message.Message):
    __slots__ = ("parcels",)
    PARCELS_FIELD_NUMBER: _ClassVar[int]
    parcels: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, parcels: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ReleaseParcelsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("token_id", "text", "finish_reason", "prompt_tokens", "visual_tokens", "logprobs", "choice")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VISUAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    text: str
    finish_reason: _inference_pb2.FinishReason
    prompt_tokens: int
    visual_tokens: int
    logprobs: _inference_pb2.TokenLogprobs
    choice: int
    def __init__(self, token_id: _Optional[int] = ..., text: _Optional[str] = ..., finish_reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ..., prompt_tokens: _Optional[int] = ..., visual_tokens: _Optional[int] = ..., logprobs: _Optional[_Union[_inference_pb2.TokenLogprobs, _Mapping]] = ..., choice: _Optional[int] = ...) -> None: ...

class NextToken(_message.Message):
    __slots__ = ("token_id", "text", "finish_reason", "logprobs", "choice")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    text: str
    finish_reason: _inference_pb2.FinishReason
    logprobs: _inference_pb2.TokenLogprobs
    choice: int
    def __init__(self, token_id: _Optional[int] = ..., text: _Optional[str] = ..., finish_reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ..., logprobs: _Optional[_Union[_inference_pb2.TokenLogprobs, _Mapping]] = ..., choice: _Optional[int] = ...) -> None: ...
