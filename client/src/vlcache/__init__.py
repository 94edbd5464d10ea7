"""Client of vlcache, the service that serves vision-language models with compressed KV transfer.

print(ask("What is in the picture?", "photo.jpg"))

with Client("127.0.0.1:50051") as client:
    completion = client.generate("What is in the picture?", images=["photo.jpg"])
    print(completion.text, completion.compression.kept_bytes)
"""

from vlcache._ask import ask
from vlcache._async_ask import ask_async
from vlcache._async_client import AsyncClient
from vlcache._async_stream import AsyncStream
from vlcache._channel import DEFAULT_ADDRESS
from vlcache._client import Client
from vlcache._completion import Choice, Completion, Timings
from vlcache._errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    ContextTooLong,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    VlcacheError,
)
from vlcache._events import (
    Compressed,
    Delta,
    Event,
    Finished,
    FinishReason,
    Guard,
    Logprobs,
    Placement,
    Started,
    TokenLogprob,
    Transferred,
    Usage,
)
from vlcache._kept import ImageGrid, Kept
from vlcache._messages import Image, ImageSource, Message, Video, VideoSource
from vlcache._openai import ChatMessage
from vlcache._request import Request
from vlcache._server_info import KVBytes, Model, ServerInfo, Totals, Worker
from vlcache._settings import Compression, RetryPolicy, Sampling, Timeout, Tls, Wire
from vlcache._stream import Stream

__all__ = [
    "DEFAULT_ADDRESS",
    "Aborted",
    "AlreadyExists",
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "ChatMessage",
    "Choice",
    "Client",
    "Completion",
    "Compressed",
    "Compression",
    "ContextTooLong",
    "DataLoss",
    "DeadlineExceeded",
    "Delta",
    "Event",
    "FailedPrecondition",
    "FinishReason",
    "Finished",
    "Guard",
    "Image",
    "ImageGrid",
    "ImageSource",
    "InternalError",
    "InvalidRequest",
    "KVBytes",
    "Kept",
    "Logprobs",
    "Message",
    "Model",
    "NotFound",
    "PermissionDenied",
    "Placement",
    "Request",
    "ResourceExhausted",
    "RetryPolicy",
    "Sampling",
    "ServerInfo",
    "Started",
    "Stream",
    "Timeout",
    "Timings",
    "Tls",
    "TokenLogprob",
    "Totals",
    "Transferred",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "Video",
    "VideoSource",
    "VlcacheError",
    "Wire",
    "Worker",
    "ask",
    "ask_async",
]
