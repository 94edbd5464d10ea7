"""The JSON of a chat request: OpenAI's fields, those that vLLM adds, and ours. What they mean: `docs/openai.md`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from router.http.errors import InvalidFieldError

MAX_MESSAGES = 4096
MAX_PARTS = 1024
# Commas and brackets of a body, those of its texts included: what has more is all structure, and takes the one loop of
# this process for seconds.
MAX_STRUCTURE = 200_000

Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]


class _Json(BaseModel):
    # a text is no number, and what is not known is looked at by `router.http.fields`
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class Url(_Json):
    """Where an image or a video is; OpenAI's `detail` is the model's own affair."""

    url: str


class TextPart(_Json):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImagePart(_Json):
    """An image."""

    type: Literal["image_url"]
    image_url: Url

    @field_validator("image_url", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value


class VideoPart(_Json):
    """A video, as vLLM has it."""

    type: Literal["video_url"]
    video_url: Url

    @field_validator("video_url", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class ChatMessage(_Json):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], Field(max_length=MAX_PARTS)]

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, value: Any) -> Any:
        return [{"type": "text", "text": value}] if isinstance(value, str) else value


class StreamOptions(_Json):
    """What a stream says besides the answer."""

    include_usage: bool = False


class JsonSchema(_Json):
    """OpenAI's wrapping of a JSON schema; name and strictness change nothing."""

    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")]


class ResponseFormat(_Json):
    """What the answer must look like, in OpenAI's words."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Json):
    """The same in vLLM's words; one of them."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Wire(_Json):
    """`WireParams` of the gRPC API."""

    bits: Count | None = None
    key_channels: float | None = None
    group: Count | None = None
    residual: Count | None = None


class ChatRequest(_Json):
    """A request for a chat completion; what is null is absent."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    max_tokens: Int32 | None = None
    max_completion_tokens: Int32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: list[str] | None = None
    n: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[Annotated[int, Field(ge=0, lt=2**32)], float] | None = None

    top_k: Int32 | None = None
    repetition_penalty: float | None = None
    min_tokens: Int32 | None = None
    ignore_eos: bool | None = None
    priority: Int32 | None = None
    request_id: str | None = None

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    retention: float | None = None
    max_kept_tokens: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    policy: str | None = None
    policy_parameters: dict[str, Any] | None = None
    budget_scope: Literal["cache", "visual"] | None = None
    min_retention: float | None = None
    max_dropped_attention: float | None = None
    wire: Wire | None = None
    explain: bool | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


def parse(body: bytes) -> ChatRequest:
    """The request in a body.

    Raises:
        InvalidFieldError: It is no JSON, or a field has a wrong type.
    """
    if sum(body.count(each) for each in (b",", b"[", b"{")) > MAX_STRUCTURE:
        raise InvalidFieldError(f"a request has at most {MAX_STRUCTURE} commas and brackets")
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise InvalidFieldError(first["msg"], param=_path(first["loc"])) from None


def _path(where: tuple[int | str, ...]) -> str:
    """`messages[0].content[1].text`."""
    path = ""
    for number, step in enumerate(where):
        if number and where[number - 1] == "content" and isinstance(step, int):
            path += f"[{step}]"
        elif number > 1 and where[number - 2] == "content":
            # which kind of part it was taken for
            continue
        else:
            path += f"[{step}]" if isinstance(step, int) else f".{step}"
    return path.removeprefix(".")
