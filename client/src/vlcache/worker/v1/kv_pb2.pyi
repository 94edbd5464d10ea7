from vlcache.v1 import inference_pb2 as _inference_pb2
from vlcache.worker.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TransferId(_message.Message):
    __slots__ = ("request_id", "attempt", "prefill_epoch")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_EPOCH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    prefill_epoch: str
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., prefill_epoch: _Optional[str] = ...) -> None: ...

class KVManifest(_message.Message):
    __slots__ = ("format_version", "transfer", "model", "compatibility", "layout", "num_kept", "logical_length", "next_position", "policy", "requested_retention", "realised_retention", "layer_attention_mass", "body_bytes", "digest", "first_token", "sampling")
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    COMPATIBILITY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    NUM_KEPT_FIELD_NUMBER: _ClassVar[int]
    LOGICAL_LENGTH_FIELD_NUMBER: _ClassVar[int]
    NEXT_POSITION_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    REQUESTED_RETENTION_FIELD_NUMBER: _ClassVar[int]
    REALISED_RETENTION_FIELD_NUMBER: _ClassVar[int]
    LAYER_ATTENTION_MASS_FIELD_NUMBER: _ClassVar[int]
    BODY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    format_version: int
    transfer: TransferId
    model: str
    compatibility: str
    layout: _worker_pb2.KVLayout
    num_kept: _containers.RepeatedScalarFieldContainer[int]
    logical_length: int
    next_position: int
    policy: str
    requested_retention: float
    realised_retention: float
    layer_attention_mass: _containers.RepeatedScalarFieldContainer[float]
    body_bytes: int
    digest: bytes
    first_token: int
    sampling: _inference_pb2.SamplingParams
    def __init__(self, format_version: _Optional[int] = ..., transfer: _Optional[_Union[TransferId, _Mapping]] = ..., model: _Optional[str] = ..., compatibility: _Optional[str] = ..., layout: _Optional[_Union[_worker_pb2.KVLayout, _Mapping]] = ..., num_kept: _Optional[_Iterable[int]] = ..., logical_length: _Optional[int] = ..., next_position: _Optional[int] = ..., policy: _Optional[str] = ..., requested_retention: _Optional[float] = ..., realised_retention: _Optional[float] = ..., layer_attention_mass: _Optional[_Iterable[float]] = ..., body_bytes: _Optional[int] = ..., digest: _Optional[bytes] = ..., first_token: _Optional[int] = ..., sampling: _Optional[_Union[_inference_pb2.SamplingParams, _Mapping]] = ...) -> None: ...

class PutKVRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: PutKVHeader
    chunk: KVChunk
    def __init__(self, header: _Optional[_Union[PutKVHeader, _Mapping]] = ..., chunk: _Optional[_Union[KVChunk, _Mapping]] = ...) -> None: ...

class PutKVHeader(_message.Message):
    __slots__ = ("token", "manifest")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    manifest: KVManifest
    def __init__(self, token: _Optional[bytes] = ..., manifest: _Optional[_Union[KVManifest, _Mapping]] = ...) -> None: ...

class KVChunk(_message.Message):
    __slots__ = ("offset", "checksum", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    checksum: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., checksum: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class PutKVResponse(_message.Message):
    __slots__ = ("received_bytes",)
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    received_bytes: int
    def __init__(self, received_bytes: _Optional[int] = ...) -> None: ...

class InstallKVRequest(_message.Message):
    __slots__ = ("token", "manifest", "slot")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    manifest: KVManifest
    slot: ArenaSlot
    def __init__(self, token: _Optional[bytes] = ..., manifest: _Optional[_Union[KVManifest, _Mapping]] = ..., slot: _Optional[_Union[ArenaSlot, _Mapping]] = ...) -> None: ...

class ArenaSlot(_message.Message):
    __slots__ = ("arena", "offset", "nbytes")
    ARENA_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    arena: str
    offset: int
    nbytes: int
    def __init__(self, arena: _Optional[str] = ..., offset: _Optional[int] = ..., nbytes: _Optional[int] = ...) -> None: ...

class InstallKVResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
