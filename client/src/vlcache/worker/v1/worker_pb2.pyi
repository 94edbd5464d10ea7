from vlcache.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetWorkerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerInfo(_message.Message):
    __slots__ = ("name", "role", "epoch", "state", "model", "requests_running", "requests_waiting", "outstanding_tokens", "kv", "arena_socket", "version", "passes_ended")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    OUTSTANDING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    ARENA_SOCKET_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PASSES_ENDED_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: str
    epoch: str
    state: str
    model: ServedModel
    requests_running: int
    requests_waiting: int
    outstanding_tokens: int
    kv: _inference_pb2.KVBytes
    arena_socket: str
    version: str
    passes_ended: int
    def __init__(self, name: _Optional[str] = ..., role: _Optional[str] = ..., epoch: _Optional[str] = ..., state: _Optional[str] = ..., model: _Optional[_Union[ServedModel, _Mapping]] = ..., requests_running: _Optional[int] = ..., requests_waiting: _Optional[int] = ..., outstanding_tokens: _Optional[int] = ..., kv: _Optional[_Union[_inference_pb2.KVBytes, _Mapping]] = ..., arena_socket: _Optional[str] = ..., version: _Optional[str] = ..., passes_ended: _Optional[int] = ...) -> None: ...

class ServedModel(_message.Message):
    __slots__ = ("name", "compatibility", "layout", "context_tokens", "max_images", "template_tokens", "max_tokens_per_image", "policies", "default_policy", "default_retention", "max_new_tokens", "default_max_new_tokens", "max_marker_tokens_per_image", "image_bounds", "max_tokens_per_video", "max_marker_tokens_per_video", "rewriting_policies")
    NAME_FIELD_NUMBER: _ClassVar[int]
    COMPATIBILITY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGES_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_PER_IMAGE_FIELD_NUMBER: _ClassVar[int]
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_POLICY_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_RETENTION_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_MARKER_TOKENS_PER_IMAGE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BOUNDS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_PER_VIDEO_FIELD_NUMBER: _ClassVar[int]
    MAX_MARKER_TOKENS_PER_VIDEO_FIELD_NUMBER: _ClassVar[int]
    REWRITING_POLICIES_FIELD_NUMBER: _ClassVar[int]
    name: str
    compatibility: str
    layout: KVLayout
    context_tokens: int
    max_images: int
    template_tokens: int
    max_tokens_per_image: int
    policies: _containers.RepeatedScalarFieldContainer[str]
    default_policy: str
    default_retention: float
    max_new_tokens: int
    default_max_new_tokens: int
    max_marker_tokens_per_image: int
    image_bounds: _containers.RepeatedCompositeFieldContainer[ImageBound]
    max_tokens_per_video: int
    max_marker_tokens_per_video: int
    rewriting_policies: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., compatibility: _Optional[str] = ..., layout: _Optional[_Union[KVLayout, _Mapping]] = ..., context_tokens: _Optional[int] = ..., max_images: _Optional[int] = ..., template_tokens: _Optional[int] = ..., max_tokens_per_image: _Optional[int] = ..., policies: _Optional[_Iterable[str]] = ..., default_policy: _Optional[str] = ..., default_retention: _Optional[float] = ..., max_new_tokens: _Optional[int] = ..., default_max_new_tokens: _Optional[int] = ..., max_marker_tokens_per_image: _Optional[int] = ..., image_bounds: _Optional[_Iterable[_Union[ImageBound, _Mapping]]] = ..., max_tokens_per_video: _Optional[int] = ..., max_marker_tokens_per_video: _Optional[int] = ..., rewriting_policies: _Optional[_Iterable[str]] = ...) -> None: ...

class ImageBound(_message.Message):
    __slots__ = ("pixels", "visual_tokens")
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    VISUAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    pixels: int
    visual_tokens: int
    def __init__(self, pixels: _Optional[int] = ..., visual_tokens: _Optional[int] = ...) -> None: ...

class KVLayout(_message.Message):
    __slots__ = ("num_layers", "num_kv_heads", "head_dim", "dtype", "windows")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    windows: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[str] = ..., windows: _Optional[_Iterable[int]] = ...) -> None: ...
