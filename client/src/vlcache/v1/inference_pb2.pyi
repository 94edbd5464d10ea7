from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BudgetScope(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BUDGET_SCOPE_UNSPECIFIED: _ClassVar[BudgetScope]
    BUDGET_SCOPE_CACHE: _ClassVar[BudgetScope]
    BUDGET_SCOPE_VISUAL: _ClassVar[BudgetScope]

class GuardOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GUARD_OUTCOME_UNSPECIFIED: _ClassVar[GuardOutcome]
    GUARD_OUTCOME_KEPT: _ClassVar[GuardOutcome]
    GUARD_OUTCOME_GROWN: _ClassVar[GuardOutcome]
    GUARD_OUTCOME_FULL: _ClassVar[GuardOutcome]
    GUARD_OUTCOME_REFUSED: _ClassVar[GuardOutcome]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
BUDGET_SCOPE_UNSPECIFIED: BudgetScope
BUDGET_SCOPE_CACHE: BudgetScope
BUDGET_SCOPE_VISUAL: BudgetScope
GUARD_OUTCOME_UNSPECIFIED: GuardOutcome
GUARD_OUTCOME_KEPT: GuardOutcome
GUARD_OUTCOME_GROWN: GuardOutcome
GUARD_OUTCOME_FULL: GuardOutcome
GUARD_OUTCOME_REFUSED: GuardOutcome
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "model", "messages", "sampling", "compression", "priority")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    messages: _containers.RepeatedCompositeFieldContainer[Message]
    sampling: SamplingParams
    compression: CompressionParams
    priority: int
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., messages: _Optional[_Iterable[_Union[Message, _Mapping]]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., compression: _Optional[_Union[CompressionParams, _Mapping]] = ..., priority: _Optional[int] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("role", "parts")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    role: str
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    def __init__(self, role: _Optional[str] = ..., parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("text", "image", "video")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    VIDEO_FIELD_NUMBER: _ClassVar[int]
    text: str
    image: Image
    video: Video
    def __init__(self, text: _Optional[str] = ..., image: _Optional[_Union[Image, _Mapping]] = ..., video: _Optional[_Union[Video, _Mapping]] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class Video(_message.Message):
    __slots__ = ("file", "frames", "sample_fps", "max_frames")
    FILE_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FPS_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAMES_FIELD_NUMBER: _ClassVar[int]
    file: bytes
    frames: Frames
    sample_fps: float
    max_frames: int
    def __init__(self, file: _Optional[bytes] = ..., frames: _Optional[_Union[Frames, _Mapping]] = ..., sample_fps: _Optional[float] = ..., max_frames: _Optional[int] = ...) -> None: ...

class Frames(_message.Message):
    __slots__ = ("images", "fps")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[Image]
    fps: float
    def __init__(self, images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., fps: _Optional[float] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "min_new_tokens", "logprobs", "n", "constraint")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    MIN_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    CONSTRAINT_FIELD_NUMBER: _ClassVar[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    ignore_eos: bool
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    min_new_tokens: int
    logprobs: int
    n: int
    constraint: Constraint
    def __init__(self, max_new_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., ignore_eos: bool = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., min_new_tokens: _Optional[int] = ..., logprobs: _Optional[int] = ..., n: _Optional[int] = ..., constraint: _Optional[_Union[Constraint, _Mapping]] = ...) -> None: ...

class Constraint(_message.Message):
    __slots__ = ("json_schema", "regex", "grammar")
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    json_schema: str
    regex: str
    grammar: str
    def __init__(self, json_schema: _Optional[str] = ..., regex: _Optional[str] = ..., grammar: _Optional[str] = ...) -> None: ...

class CompressionParams(_message.Message):
    __slots__ = ("policy", "retention", "max_kept_tokens", "parameters", "wire", "budget_scope", "min_retention", "max_dropped_attention", "explain")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    MAX_KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    WIRE_FIELD_NUMBER: _ClassVar[int]
    BUDGET_SCOPE_FIELD_NUMBER: _ClassVar[int]
    MIN_RETENTION_FIELD_NUMBER: _ClassVar[int]
    MAX_DROPPED_ATTENTION_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    policy: str
    retention: float
    max_kept_tokens: int
    parameters: _struct_pb2.Struct
    wire: WireParams
    budget_scope: BudgetScope
    min_retention: float
    max_dropped_attention: float
    explain: bool
    def __init__(self, policy: _Optional[str] = ..., retention: _Optional[float] = ..., max_kept_tokens: _Optional[int] = ..., parameters: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., wire: _Optional[_Union[WireParams, _Mapping]] = ..., budget_scope: _Optional[_Union[BudgetScope, str]] = ..., min_retention: _Optional[float] = ..., max_dropped_attention: _Optional[float] = ..., explain: bool = ...) -> None: ...

class WireParams(_message.Message):
    __slots__ = ("bits", "key_channels", "group", "residual")
    BITS_FIELD_NUMBER: _ClassVar[int]
    KEY_CHANNELS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_FIELD_NUMBER: _ClassVar[int]
    bits: int
    key_channels: float
    group: int
    residual: int
    def __init__(self, bits: _Optional[int] = ..., key_channels: _Optional[float] = ..., group: _Optional[int] = ..., residual: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("started", "delta", "compression", "transfer", "finished")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    started: Started
    delta: Delta
    compression: Compression
    transfer: Transfer
    finished: Finished
    def __init__(self, started: _Optional[_Union[Started, _Mapping]] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ..., compression: _Optional[_Union[Compression, _Mapping]] = ..., transfer: _Optional[_Union[Transfer, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ("request_id", "model")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("token_ids", "text", "logprobs", "choice", "finish_reason")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    choice: int
    finish_reason: FinishReason
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., choice: _Optional[int] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("token", "top")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    token: TokenLogprob
    top: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, token: _Optional[_Union[TokenLogprob, _Mapping]] = ..., top: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "text", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    text: str
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., text: _Optional[str] = ..., logprob: _Optional[float] = ...) -> None: ...

class Compression(_message.Message):
    __slots__ = ("policy", "requested_retention", "realised_retention", "full_bytes", "kept_bytes", "layer_tokens", "layer_attention_mass", "prompt_tokens", "visual_tokens", "asked_retention", "guard", "kept")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    REQUESTED_RETENTION_FIELD_NUMBER: _ClassVar[int]
    REALISED_RETENTION_FIELD_NUMBER: _ClassVar[int]
    FULL_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYER_ATTENTION_MASS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VISUAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ASKED_RETENTION_FIELD_NUMBER: _ClassVar[int]
    GUARD_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    policy: str
    requested_retention: float
    realised_retention: float
    full_bytes: int
    kept_bytes: int
    layer_tokens: _containers.RepeatedScalarFieldContainer[int]
    layer_attention_mass: _containers.RepeatedScalarFieldContainer[float]
    prompt_tokens: int
    visual_tokens: int
    asked_retention: float
    guard: GuardOutcome
    kept: KeptTokens
    def __init__(self, policy: _Optional[str] = ..., requested_retention: _Optional[float] = ..., realised_retention: _Optional[float] = ..., full_bytes: _Optional[int] = ..., kept_bytes: _Optional[int] = ..., layer_tokens: _Optional[_Iterable[int]] = ..., layer_attention_mass: _Optional[_Iterable[float]] = ..., prompt_tokens: _Optional[int] = ..., visual_tokens: _Optional[int] = ..., asked_retention: _Optional[float] = ..., guard: _Optional[_Union[GuardOutcome, str]] = ..., kept: _Optional[_Union[KeptTokens, _Mapping]] = ...) -> None: ...

class KeptTokens(_message.Message):
    __slots__ = ("num_kv_heads", "layers", "images")
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    num_kv_heads: int
    layers: _containers.RepeatedScalarFieldContainer[bytes]
    images: _containers.RepeatedCompositeFieldContainer[ImageGrid]
    def __init__(self, num_kv_heads: _Optional[int] = ..., layers: _Optional[_Iterable[bytes]] = ..., images: _Optional[_Iterable[_Union[ImageGrid, _Mapping]]] = ...) -> None: ...

class ImageGrid(_message.Message):
    __slots__ = ("first_token", "rows", "columns", "left", "top", "right", "bottom")
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    RIGHT_FIELD_NUMBER: _ClassVar[int]
    BOTTOM_FIELD_NUMBER: _ClassVar[int]
    first_token: int
    rows: int
    columns: int
    left: float
    top: float
    right: float
    bottom: float
    def __init__(self, first_token: _Optional[int] = ..., rows: _Optional[int] = ..., columns: _Optional[int] = ..., left: _Optional[float] = ..., top: _Optional[float] = ..., right: _Optional[float] = ..., bottom: _Optional[float] = ...) -> None: ...

class Transfer(_message.Message):
    __slots__ = ("transport", "sent_bytes", "seconds")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    transport: str
    sent_bytes: int
    seconds: float
    def __init__(self, transport: _Optional[str] = ..., sent_bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("usage", "seed", "placement")
    USAGE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    usage: Usage
    seed: int
    placement: Placement
    def __init__(self, usage: _Optional[_Union[Usage, _Mapping]] = ..., seed: _Optional[int] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "visual_tokens", "generated_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VISUAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    visual_tokens: int
    generated_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., visual_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("prefill_worker", "decode_worker")
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    prefill_worker: str
    decode_worker: str
    def __init__(self, prefill_worker: _Optional[str] = ..., decode_worker: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "context_tokens", "max_images", "policies", "default_policy", "default_retention", "kv_bytes_per_token")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGES_FIELD_NUMBER: _ClassVar[int]
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_POLICY_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_RETENTION_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    name: str
    context_tokens: int
    max_images: int
    policies: _containers.RepeatedScalarFieldContainer[str]
    default_policy: str
    default_retention: float
    kv_bytes_per_token: int
    def __init__(self, name: _Optional[str] = ..., context_tokens: _Optional[int] = ..., max_images: _Optional[int] = ..., policies: _Optional[_Iterable[str]] = ..., default_policy: _Optional[str] = ..., default_retention: _Optional[float] = ..., kv_bytes_per_token: _Optional[int] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "workers", "totals", "requests_running", "requests_waiting")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    TOTALS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    version: str
    workers: _containers.RepeatedCompositeFieldContainer[Worker]
    totals: Totals
    requests_running: int
    requests_waiting: int
    def __init__(self, version: _Optional[str] = ..., workers: _Optional[_Iterable[_Union[Worker, _Mapping]]] = ..., totals: _Optional[_Union[Totals, _Mapping]] = ..., requests_running: _Optional[int] = ..., requests_waiting: _Optional[int] = ...) -> None: ...

class Worker(_message.Message):
    __slots__ = ("name", "role", "address", "state", "model", "requests_running", "requests_waiting", "kv")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: str
    address: str
    state: str
    model: str
    requests_running: int
    requests_waiting: int
    kv: KVBytes
    def __init__(self, name: _Optional[str] = ..., role: _Optional[str] = ..., address: _Optional[str] = ..., state: _Optional[str] = ..., model: _Optional[str] = ..., requests_running: _Optional[int] = ..., requests_waiting: _Optional[int] = ..., kv: _Optional[_Union[KVBytes, _Mapping]] = ...) -> None: ...

class KVBytes(_message.Message):
    __slots__ = ("capacity", "reserved", "filling", "active", "retained")
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    FILLING_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    RETAINED_FIELD_NUMBER: _ClassVar[int]
    capacity: int
    reserved: int
    filling: int
    active: int
    retained: int
    def __init__(self, capacity: _Optional[int] = ..., reserved: _Optional[int] = ..., filling: _Optional[int] = ..., active: _Optional[int] = ..., retained: _Optional[int] = ...) -> None: ...

class Totals(_message.Message):
    __slots__ = ("requests", "kv_full_bytes", "kv_kept_bytes", "kv_sent_bytes", "generated_tokens")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    KV_FULL_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_KEPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    requests: int
    kv_full_bytes: int
    kv_kept_bytes: int
    kv_sent_bytes: int
    generated_tokens: int
    def __init__(self, requests: _Optional[int] = ..., kv_full_bytes: _Optional[int] = ..., kv_kept_bytes: _Optional[int] = ..., kv_sent_bytes: _Optional[int] = ..., generated_tokens: _Optional[int] = ...) -> None: ...
