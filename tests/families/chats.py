"""Conversations of every shape, as a client sends them and as transformers' own processors take them."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image
from vlcache.v1 import inference_pb2 as pb

from tests.families.loaded import Loaded, noise

Part = str | Image.Image
Chat = list[tuple[str, list[Part]]]

SYSTEM = ("system", ["You are a helpful assistant."])
QUESTION = "What is in the image?"
SQUARE, WIDE, TALL, SMALL = noise(28, 28), noise(112, 56, seed=1), noise(56, 84, seed=2), noise(28, 40, seed=3)
CHATS: dict[str, Chat] = {
    "text": [SYSTEM, ("user", [QUESTION])],
    "one image": [SYSTEM, ("user", [SQUARE, QUESTION])],
    "tiles": [SYSTEM, ("user", [WIDE, QUESTION])],
    "several images": [SYSTEM, ("user", [TALL, SMALL, "Compare the two images."])],
    "image last": [("user", [QUESTION, WIDE])],
    "interleaved": [("user", ["First:", TALL, "then:", SMALL, "Compare the two images."])],
    "turns": [("user", [SMALL, QUESTION]), ("assistant", ["yes"]), ("user", ["And here?", TALL, "Compare."])],
}


def messages(chat: Chat) -> list[pb.Message]:
    """As they reach a prefill worker."""
    return [pb.Message(role=role, parts=[_sent(part) for part in parts]) for role, parts in chat]


def inputs_of(loaded: Loaded, chat: Chat) -> dict[str, Any]:
    """What the model takes, made by transformers alone."""
    told = [{"role": role, "content": [_told(part) for part in parts]} for role, parts in chat]
    text = loaded.processor.apply_chat_template(told, add_generation_prompt=True)
    images = images_of(chat)
    # one list per conversation: some families show several images of one in less detail
    shown = [images] if images else None
    return dict(loaded.processor(text=[text], images=shown, add_special_tokens=False, return_tensors="pt"))


def images_of(chat: Chat) -> list[Image.Image]:
    return [part for _, parts in chat for part in parts if isinstance(part, Image.Image)]


def asked(*parts: Part) -> Chat:
    return [SYSTEM, ("user", list(parts))]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _sent(part: Part) -> pb.Part:
    return pb.Part(text=part) if isinstance(part, str) else pb.Part(image=pb.Image(data=png(part)))


def _told(part: Part) -> dict[str, str]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
