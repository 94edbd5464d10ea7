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
    __slots__ = ("format_version", "transfer", "model", "compatibility", "layout", "num_kept", "logical_length", "next_position", "policy", "requested_retention", "realised_retention", "layer_attention_mass", "body_bytes", "digest", "generated", "sampling", "encoding", "eviction", "score_bytes", "kept_tokens", "seen_tokens", "prompt_token_ids", "choice", "others")
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
    GENERATED_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    EVICTION_FIELD_NUMBER: _ClassVar[int]
    SCORE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEEN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
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
    generated: _containers.RepeatedScalarFieldContainer[int]
    sampling: _inference_pb2.SamplingParams
    encoding: KVEncoding
    eviction: Eviction
    score_bytes: int
    kept_tokens: _containers.RepeatedScalarFieldContainer[bytes]
    seen_tokens: _containers.RepeatedScalarFieldContainer[bytes]
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    choice: int
    others: _containers.RepeatedCompositeFieldContainer[BegunAnswer]
    def __init__(self, format_version: _Optional[int] = ..., transfer: _Optional[_Union[TransferId, _Mapping]] = ..., model: _Optional[str] = ..., compatibility: _Optional[str] = ..., layout: _Optional[_Union[_worker_pb2.KVLayout, _Mapping]] = ..., num_kept: _Optional[_Iterable[int]] = ..., logical_length: _Optional[int] = ..., next_position: _Optional[int] = ..., policy: _Optional[str] = ..., requested_retention: _Optional[float] = ..., realised_retention: _Optional[float] = ..., layer_attention_mass: _Optional[_Iterable[float]] = ..., body_bytes: _Optional[int] = ..., digest: _Optional[bytes] = ..., generated: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_inference_pb2.SamplingParams, _Mapping]] = ..., encoding: _Optional[_Union[KVEncoding, _Mapping]] = ..., eviction: _Optional[_Union[Eviction, _Mapping]] = ..., score_bytes: _Optional[int] = ..., kept_tokens: _Optional[_Iterable[bytes]] = ..., seen_tokens: _Optional[_Iterable[bytes]] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., choice: _Optional[int] = ..., others: _Optional[_Iterable[_Union[BegunAnswer, _Mapping]]] = ...) -> None: ...

class BegunAnswer(_message.Message):
    __slots__ = ("choice", "first_token")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    choice: int
    first_token: int
    def __init__(self, choice: _Optional[int] = ..., first_token: _Optional[int] = ...) -> None: ...

class Eviction(_message.Message):
    __slots__ = ("fixed_slot", "heavy_hitters", "scope", "text_guard", "sparse_read", "recall", "shared_layers")
    class Share(_message.Message):
        __slots__ = ("numerator", "denominator")
        NUMERATOR_FIELD_NUMBER: _ClassVar[int]
        DENOMINATOR_FIELD_NUMBER: _ClassVar[int]
        numerator: int
        denominator: int
        def __init__(self, numerator: _Optional[int] = ..., denominator: _Optional[int] = ...) -> None: ...
    class FixedSlot(_message.Message):
        __slots__ = ("retention", "distance")
        RETENTION_FIELD_NUMBER: _ClassVar[int]
        DISTANCE_FIELD_NUMBER: _ClassVar[int]
        retention: _containers.RepeatedCompositeFieldContainer[Eviction.Share]
        distance: int
        def __init__(self, retention: _Optional[_Iterable[_Union[Eviction.Share, _Mapping]]] = ..., distance: _Optional[int] = ...) -> None: ...
    class HeavyHitters(_message.Message):
        __slots__ = ("budget", "recent")
        BUDGET_FIELD_NUMBER: _ClassVar[int]
        RECENT_FIELD_NUMBER: _ClassVar[int]
        budget: int
        recent: int
        def __init__(self, budget: _Optional[int] = ..., recent: _Optional[int] = ...) -> None: ...
    class Scope(_message.Message):
        __slots__ = ("variant", "window", "recent", "delta")
        VARIANT_FIELD_NUMBER: _ClassVar[int]
        WINDOW_FIELD_NUMBER: _ClassVar[int]
        RECENT_FIELD_NUMBER: _ClassVar[int]
        DELTA_FIELD_NUMBER: _ClassVar[int]
        variant: str
        window: int
        recent: int
        delta: int
        def __init__(self, variant: _Optional[str] = ..., window: _Optional[int] = ..., recent: _Optional[int] = ..., delta: _Optional[int] = ...) -> None: ...
    class TextGuard(_message.Message):
        __slots__ = ("retention", "sinks", "text")
        RETENTION_FIELD_NUMBER: _ClassVar[int]
        SINKS_FIELD_NUMBER: _ClassVar[int]
        TEXT_FIELD_NUMBER: _ClassVar[int]
        retention: _containers.RepeatedCompositeFieldContainer[Eviction.Share]
        sinks: int
        text: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, retention: _Optional[_Iterable[_Union[Eviction.Share, _Mapping]]] = ..., sinks: _Optional[int] = ..., text: _Optional[_Iterable[int]] = ...) -> None: ...
    class SparseRead(_message.Message):
        __slots__ = ("select_layers", "top")
        SELECT_LAYERS_FIELD_NUMBER: _ClassVar[int]
        TOP_FIELD_NUMBER: _ClassVar[int]
        select_layers: _containers.RepeatedScalarFieldContainer[int]
        top: int
        def __init__(self, select_layers: _Optional[_Iterable[int]] = ..., top: _Optional[int] = ...) -> None: ...
    class Recall(_message.Message):
        __slots__ = ("budget", "recent", "sinks")
        BUDGET_FIELD_NUMBER: _ClassVar[int]
        RECENT_FIELD_NUMBER: _ClassVar[int]
        SINKS_FIELD_NUMBER: _ClassVar[int]
        budget: _containers.RepeatedScalarFieldContainer[int]
        recent: _containers.RepeatedScalarFieldContainer[int]
        sinks: int
        def __init__(self, budget: _Optional[_Iterable[int]] = ..., recent: _Optional[_Iterable[int]] = ..., sinks: _Optional[int] = ...) -> None: ...
    class SharedLayers(_message.Message):
        __slots__ = ("borrowers", "lenders")
        BORROWERS_FIELD_NUMBER: _ClassVar[int]
        LENDERS_FIELD_NUMBER: _ClassVar[int]
        borrowers: _containers.RepeatedScalarFieldContainer[int]
        lenders: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, borrowers: _Optional[_Iterable[int]] = ..., lenders: _Optional[_Iterable[int]] = ...) -> None: ...
    FIXED_SLOT_FIELD_NUMBER: _ClassVar[int]
    HEAVY_HITTERS_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    TEXT_GUARD_FIELD_NUMBER: _ClassVar[int]
    SPARSE_READ_FIELD_NUMBER: _ClassVar[int]
    RECALL_FIELD_NUMBER: _ClassVar[int]
    SHARED_LAYERS_FIELD_NUMBER: _ClassVar[int]
    fixed_slot: Eviction.FixedSlot
    heavy_hitters: Eviction.HeavyHitters
    scope: Eviction.Scope
    text_guard: Eviction.TextGuard
    sparse_read: Eviction.SparseRead
    recall: Eviction.Recall
    shared_layers: Eviction.SharedLayers
    def __init__(self, fixed_slot: _Optional[_Union[Eviction.FixedSlot, _Mapping]] = ..., heavy_hitters: _Optional[_Union[Eviction.HeavyHitters, _Mapping]] = ..., scope: _Optional[_Union[Eviction.Scope, _Mapping]] = ..., text_guard: _Optional[_Union[Eviction.TextGuard, _Mapping]] = ..., sparse_read: _Optional[_Union[Eviction.SparseRead, _Mapping]] = ..., recall: _Optional[_Union[Eviction.Recall, _Mapping]] = ..., shared_layers: _Optional[_Union[Eviction.SharedLayers, _Mapping]] = ...) -> None: ...

class KVEncoding(_message.Message):
    __slots__ = ("bits", "group", "residual", "key_channels")
    BITS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_FIELD_NUMBER: _ClassVar[int]
    KEY_CHANNELS_FIELD_NUMBER: _ClassVar[int]
    bits: int
    group: int
    residual: int
    key_channels: int
    def __init__(self, bits: _Optional[int] = ..., group: _Optional[int] = ..., residual: _Optional[int] = ..., key_channels: _Optional[int] = ...) -> None: ...

class PutKVRequest(_message.Message):
    __slots__ = ("header", "chunk", "opening", "trailer")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    OPENING_FIELD_NUMBER: _ClassVar[int]
    TRAILER_FIELD_NUMBER: _ClassVar[int]
    header: PutKVHeader
    chunk: KVChunk
    opening: PutKVOpening
    trailer: PutKVTrailer
    def __init__(self, header: _Optional[_Union[PutKVHeader, _Mapping]] = ..., chunk: _Optional[_Union[KVChunk, _Mapping]] = ..., opening: _Optional[_Union[PutKVOpening, _Mapping]] = ..., trailer: _Optional[_Union[PutKVTrailer, _Mapping]] = ...) -> None: ...

class PutKVHeader(_message.Message):
    __slots__ = ("token", "manifest")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    manifest: KVManifest
    def __init__(self, token: _Optional[bytes] = ..., manifest: _Optional[_Union[KVManifest, _Mapping]] = ...) -> None: ...

class PutKVOpening(_message.Message):
    __slots__ = ("token", "format_version")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    format_version: int
    def __init__(self, token: _Optional[bytes] = ..., format_version: _Optional[int] = ...) -> None: ...

class PutKVTrailer(_message.Message):
    __slots__ = ("manifest",)
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    manifest: KVManifest
    def __init__(self, manifest: _Optional[_Union[KVManifest, _Mapping]] = ...) -> None: ...

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
