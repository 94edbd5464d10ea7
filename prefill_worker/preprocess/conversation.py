"""A conversation as the model's own chat template renders it. Templates differ in the form that they expect of a
message's content, and some leave out what they do not: without an error, and without what the model was told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from vlcache.v1 import inference_pb2 as pb

from shared.errors import InvalidRequestError

Content = str | list[dict[str, str]]
# What templates raise of contents in a form that they do not expect; a sentence for users among them.
REFUSALS = (TemplateError, TypeError)


def render(processor: Any, messages: Sequence[pb.Message]) -> str:
    """The prompt's text up to the answer, with placeholders of images and videos.

    Raises:
        InvalidRequestError: The template refuses the conversation, or leaves some of it out.
    """
    why = []
    for form in (_parts, _one_system_part, _strings):
        try:
            return _rendered(processor, messages, form)
        except REFUSALS as error:
            why.append(str(error))
    raise InvalidRequestError(f"the model's chat template refuses this conversation: {why[0]}", reason="CHAT_TEMPLATE")


def _rendered(processor: Any, messages: Sequence[pb.Message], form: Callable[[pb.Message], Content]) -> str:
    chat: list[dict[str, Any]] = [{"role": message.role, "content": form(message)} for message in messages]
    text: str = processor.apply_chat_template(chat, add_generation_prompt=True)
    at = 0
    for told, message in zip(chat, messages, strict=True):
        if not isinstance(told["content"], str) and str(told["content"]) in text:
            raise TemplateError(f"it writes the parts of a message of the {message.role} as they are")
        for part in message.parts:
            # templates may trim
            written = part.text.strip()
            at = text.find(written, at) + len(written)
            if at < len(written):
                raise TemplateError(f"it leaves out text of the {message.role}")
    return text


def _parts(message: pb.Message) -> Content:
    """What vision-language templates expect."""
    return [
        {"type": "text", "text": part.text} if part.HasField("text") else {"type": part.WhichOneof("part") or ""}
        for part in message.parts
    ]


def _one_system_part(message: pb.Message) -> Content:
    """Of a system message some read the first part alone."""
    return [{"type": "text", "text": _text(message)}] if message.role == "system" else _parts(message)


def _strings(message: pb.Message) -> Content:
    """What others expect where there is only text."""
    return _text(message) if all(part.HasField("text") for part in message.parts) else _parts(message)


def _text(message: pb.Message) -> str:
    return "".join(part.text for part in message.parts)
