"""Conversations, and what their images and videos may be."""

from __future__ import annotations

import asyncio
import base64
import os
from typing import Any

import pytest
from vlcache.v1 import inference_pb2 as pb

from router.http import data_uri
from router.http.errors import InvalidFieldError
from router.http.fields import MAX_NAMES, Ignored, check_fields
from router.http.messages import to_messages
from router.http.remote_images import RemoteImages
from tests.unit.router.http.test_requests import parsed


def uri(media_type: str, *files: bytes) -> str:
    return f"data:{media_type};base64," + ",".join(base64.b64encode(file).decode() for file in files)


def convert(*messages: dict[str, Any]) -> list[pb.Message]:
    async def main() -> list[pb.Message]:
        return await to_messages(parsed(messages=list(messages)).messages, RemoteImages(()))

    return asyncio.run(main())


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def image(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url}


def video(url: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": url}


def test_a_conversation() -> None:
    said = convert(
        {"role": "developer", "content": "Be short."},
        user(image({"url": uri("image/png", b"one"), "detail": "high"}), {"type": "text", "text": "What?"}),
        {"role": "assistant", "content": "A cat.", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "Sure?", "name": "Ann"},
    )
    assert said == [
        pb.Message(role="system", parts=[pb.Part(text="Be short.")]),
        pb.Message(role="user", parts=[pb.Part(image=pb.Image(data=b"one")), pb.Part(text="What?")]),
        pb.Message(role="assistant", parts=[pb.Part(text="A cat.")]),
        pb.Message(role="user", parts=[pb.Part(text="Sure?")]),
    ]


def test_a_url_may_stand_by_itself() -> None:
    (message,) = convert(user(image(uri("image/jpeg", b"x")), video(uri("video/mp4", b"y"))))
    assert list(message.parts) == [pb.Part(image=pb.Image(data=b"x")), pb.Part(video=pb.Video(file=b"y"))]


def test_a_video_may_be_frames() -> None:
    (message,) = convert(user(video({"url": uri("video/jpeg", b"one", b"two")})))
    frames = pb.Frames(images=[pb.Image(data=b"one"), pb.Image(data=b"two")])
    assert message.parts[0].video == pb.Video(frames=frames)


def test_large_files_are_decoded_in_pieces_and_whole() -> None:
    for size in (data_uri.PIECE * 3 // 4 - 1, data_uri.PIECE * 3 // 4, data_uri.PIECE * 3 // 4 + 1, 3_000_000):
        file = os.urandom(size)
        (message,) = convert(user(image({"url": uri("image/png", file)})))
        assert message.parts[0].image.data == file


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,%%%",
        "data:image/png;base64,abc",
        "data:image/png,abcd",
        "data:text/plain;base64,abcd",
        "data:video/mp4;base64,abcd",
        "data:;base64,abcd",
        "data:image/png;base64",
        "data:image/png;base64," + "QQ==" + "A" * data_uri.PIECE,
        "data:image/png;base64," + "é" * 8,
    ],
)
def test_what_is_no_image_is_refused_with_its_place(url: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        convert(user({"type": "text", "text": "a"}, image({"url": url})))
    assert caught.value.param == "messages[0].content[1].image_url.url"


@pytest.mark.parametrize(
    "url", ["http://images.example/a.png", "https://127.0.0.1/", "file:///etc/passwd", "", "ftp://x/y"]
)
def test_nothing_is_fetched_unless_an_operator_says_so(url: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        convert(user(image({"url": url})))
    assert caught.value.param == "messages[0].content[0].image_url.url"


def test_videos_are_never_fetched() -> None:
    with pytest.raises(InvalidFieldError, match="not a data:video"):
        convert(user(video({"url": "http://videos.example/a.mp4"})))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("audio", {"voice": "x"}),
        ("modalities", ["text", "audio"]),
        ("min_p", 0.1),
        ("stop_token_ids", [1]),
        ("use_beam_search", True),
        ("chat_template", "x"),
    ],
)
def test_what_would_change_the_answer_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        check_fields(parsed(**{field: value}), Ignored())
    assert (caught.value.param, caught.value.reason) == (field, "UNSUPPORTED_FIELD")


@pytest.mark.parametrize(
    ("field", "value"),
    [("tools", []), ("tools", None), ("tool_choice", "none"), ("modalities", ["text"]), ("min_p", 0), ("min_p", 0.0)],
)
def test_what_asks_for_nothing_is_not(field: str, value: Any) -> None:
    check_fields(parsed(**{field: value}), Ignored())


def test_tool_calls_in_a_conversation_are_refused() -> None:
    message = {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}
    with pytest.raises(InvalidFieldError) as caught:
        check_fields(parsed(messages=[{"role": "user", "content": "a"}, message]), Ignored())
    assert caught.value.param == "messages[1].tool_calls"


def test_other_fields_are_ignored_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    ignored = Ignored()
    for _ in range(3):
        check_fields(parsed(reasoning_effort="high", store=False, user="me"), ignored)
    assert [record.getMessage() for record in caplog.records] == [
        f"requests have a field '{name}', which is ignored" for name in ("reasoning_effort", "store")
    ]
    for number in range(2 * MAX_NAMES):
        check_fields(parsed(**{f"\n{number}": 1}), ignored)
    assert len(caplog.records) == MAX_NAMES
    assert not any("\n" in record.getMessage() for record in caplog.records)
