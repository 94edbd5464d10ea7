"""Messages in the form of OpenAI's chat API: dicts of a role and a content, which is a text or a list of parts."""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlcache._messages import Image, Message, Video

ChatMessage = Message | Mapping[str, Any]
_DATA_URI = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)


def as_messages(messages: Sequence[ChatMessage] | None) -> list[Message] | None:
    """A chat of either form; None stays what it is.

    A part is `{"type": "text", "text": ...}`
    or `{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}`
    or, as in a `Message`, a text, an `Image` or a `Video`.

    Raises ValueError or TypeError, which name the message, when one has another form.
    """
    if messages is None:
        return None
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: ChatMessage, where: str) -> Message:
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping):
        raise TypeError(f"{where} is a Message or a dict of role and content, not {type(message).__name__}")
    _check_keys(message, {"role", "content"}, where)
    content = message["content"]
    if isinstance(content, str):
        content = [content]
    if not isinstance(content, Sequence):
        raise TypeError(f"{where}: content is a text or a list of parts, not {type(content).__name__}")
    parts = [_part(part, f"{where}, content[{index}]") for index, part in enumerate(content)]
    try:
        return Message(role=message["role"], parts=parts)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _part(part: object, where: str) -> str | Image | Video:
    if isinstance(part, str | Image | Video):
        return part
    if not isinstance(part, Mapping):
        raise TypeError(f"{where} is a dict, a text, an Image or a Video, not {type(part).__name__}")
    kind = part.get("type")
    if kind == "text":
        _check_keys(part, {"type", "text"}, where)
        return _checked_text(part["text"], where)
    if kind == "image_url":
        _check_keys(part, {"type", "image_url"}, where)
        return Image(_decoded(_url(part["image_url"], where), where))
    raise ValueError(f"{where}: type must be text or image_url, got {kind!r}")


def _url(image_url: object, where: str) -> str:
    if isinstance(image_url, Mapping):
        _check_keys(image_url, {"url"}, where)
        image_url = image_url["url"]
    return _checked_text(image_url, where)


def _decoded(url: str, where: str) -> bytes:
    prefix = _DATA_URI.match(url)
    if prefix is None:
        raise ValueError(f"{where}: the service fetches nothing: give a data:image/...;base64, URI or an Image")
    try:
        return base64.b64decode(url[prefix.end() :], validate=True)
    except binascii.Error as error:
        raise ValueError(f"{where}: this is no base64: {error}") from None


def _checked_text(text: object, where: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{where}: expected a text, got {type(text).__name__}")
    return text


def _check_keys(given: Mapping[Any, Any], allowed: set[str], where: str) -> None:
    """What is not understood is not left out silently."""
    if missing := sorted(allowed - set(given)):
        raise ValueError(f"{where} has no {', '.join(missing)}")
    if unknown := sorted(map(str, set(given) - allowed)):
        raise ValueError(f"{where} has {', '.join(unknown)}, which is not supported")
