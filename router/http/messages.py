"""The messages of a chat request as those of the gRPC API, images included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vlcache.v1 import inference_pb2 as pb

from router.http import data_uri
from router.http.remote_images import RemoteImages
from router.http.schema import ChatMessage, ImagePart, TextPart, VideoPart

# OpenAI's newer name for who instructs.
ROLES = {"developer": "system"}
DATA = "data:"


async def to_messages(messages: Sequence[ChatMessage], remote: RemoteImages) -> list[pb.Message]:
    """The conversation.

    Raises:
        InvalidFieldError: An image or a video is not what it should be, or is nowhere to be had.
    """
    fetched = await remote.fetch(dict(_urls(messages)))
    converted = []
    for number, message in enumerate(messages):
        where = f"messages[{number}].content"
        parts = [await _part(part, f"{where}[{index}]", fetched) for index, part in enumerate(message.content)]
        converted.append(pb.Message(role=ROLES.get(message.role, message.role), parts=parts))
    return converted


def _urls(messages: Sequence[ChatMessage]) -> Iterator[tuple[str, str]]:
    """Every image that is somewhere else, and its place in the request."""
    for number, message in enumerate(messages):
        for index, part in enumerate(message.content):
            if isinstance(part, ImagePart) and not _is_data(part.image_url.url):
                yield part.image_url.url, f"messages[{number}].content[{index}].image_url.url"


async def _part(part: TextPart | ImagePart | VideoPart, where: str, fetched: Mapping[str, bytes]) -> pb.Part:
    if isinstance(part, TextPart):
        return pb.Part(text=part.text)
    if isinstance(part, VideoPart):
        return pb.Part(video=await _video(part.video_url.url, f"{where}.video_url.url"))
    url = part.image_url.url
    if not _is_data(url):
        return pb.Part(image=pb.Image(data=fetched[url]))
    _, (file,) = await data_uri.decode(url, "image", f"{where}.image_url.url")
    return pb.Part(image=pb.Image(data=file))


async def _video(url: str, where: str) -> pb.Video:
    media_type, files = await data_uri.decode(url, "video", where)
    if media_type == data_uri.FRAMES:
        return pb.Video(frames=pb.Frames(images=[pb.Image(data=file) for file in files]))
    return pb.Video(file=files[0])


def _is_data(url: str) -> bool:
    return url[: len(DATA)].lower() == DATA
