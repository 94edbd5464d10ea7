import io
import re
from pathlib import Path

import PIL.Image
import pytest
from vlcache import Compression, Image, InvalidRequest, Message, Sampling, Video
from vlcache._channel import MAX_MESSAGE_BYTES
from vlcache._messages import build_request


def build(**options):
    defaults = {
        "prompt": None,
        "images": (),
        "videos": (),
        "messages": None,
        "model": "",
        "sampling": None,
        "compression": None,
        "priority": 0,
        "request_id": None,
    }
    return build_request(**(defaults | options))


def kinds(message):
    return [part.WhichOneof("part") for part in message.parts]


def test_a_prompt_is_one_user_message_with_its_images_first():
    request = build(prompt="Which shape?", images=[b"one", b"two"])
    (message,) = request.messages
    assert message.role == "user"
    assert kinds(message) == ["image", "image", "text"]
    assert [part.image.data for part in message.parts[:2]] == [b"one", b"two"]
    assert message.parts[2].text == "Which shape?"


def test_messages_keep_their_order():
    chat = [
        Message(role="system", parts=["Be short."]),
        Message(role="user", parts=["Compare", Image(b"one"), "with", Image(b"two")]),
    ]
    request = build(messages=chat)
    assert [message.role for message in request.messages] == ["system", "user"]
    assert kinds(request.messages[1]) == ["text", "image", "text", "image"]


@pytest.mark.parametrize("as_path", [str, lambda path: path])
def test_an_image_may_be_a_path(tmp_path, as_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"png bytes")
    assert Image(as_path(path)).read() == b"png bytes"


def test_a_pil_image_travels_as_png():
    image = PIL.Image.new("RGB", (3, 2), (255, 0, 0))
    with PIL.Image.open(io.BytesIO(Image(image).read())) as sent:
        assert (sent.format, sent.size, sent.getpixel((0, 0))) == ("PNG", (3, 2), (255, 0, 0))


def test_wrong_images_are_refused(tmp_path):
    with pytest.raises(OSError, match=r"missing\.png"):
        build(prompt="?", images=[tmp_path / "missing.png"])
    with pytest.raises(ValueError, match="empty"):
        build(prompt="?", images=[b""])
    with pytest.raises(TypeError, match="not int"):
        build(prompt="?", images=[7])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"messages": []},
        {"prompt": "?", "messages": [Message(role="user", parts=["?"])]},
        {"images": [b"x"], "messages": [Message(role="user", parts=["?"])]},
        {"prompt": "?", "request_id": ""},
        {"prompt": "?", "request_id": "a b"},
        {"prompt": "?", "request_id": "a\n"},
        {"prompt": "?", "request_id": "x" * 129},
        {"prompt": "?", "priority": -101},
        {"prompt": "?", "priority": 101},
    ],
)
def test_contradictory_options_are_refused(options):
    with pytest.raises(ValueError):
        build(**options)


@pytest.mark.parametrize("wrong", [{"role": "tool", "parts": ["?"]}, {"role": "user", "parts": []}])
def test_a_wrong_message_is_refused(wrong):
    with pytest.raises(ValueError):
        Message(**wrong)


def test_text_is_not_taken_for_a_sequence_of_parts():
    with pytest.raises(ValueError, match="parts"):
        Message(role="user", parts="hello")


def test_every_request_has_an_id_of_its_own():
    first, second = build(prompt="?"), build(prompt="?")
    assert re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", first.request_id)
    assert first.request_id != second.request_id
    assert build(prompt="?", request_id="mine:1").request_id == "mine:1"


def test_settings_are_sent_only_when_given():
    assert not build(prompt="?").HasField("sampling")
    assert not build(prompt="?").HasField("compression")
    request = build(prompt="?", model="m", sampling=Sampling(seed=3), compression=Compression(retention=0.2))
    assert (request.model, request.sampling.seed, request.compression.retention) == ("m", 3, 0.2)


def test_a_request_above_the_limit_is_refused_and_one_below_is_not():
    with pytest.raises(InvalidRequest, match=str(MAX_MESSAGE_BYTES)) as caught:
        build(prompt="?", images=[bytes(MAX_MESSAGE_BYTES)], request_id="big")
    assert caught.value.request_id == "big"
    assert not caught.value.retryable
    assert build(prompt="?", images=[bytes(MAX_MESSAGE_BYTES - 1000)]).ByteSize() <= MAX_MESSAGE_BYTES


def test_a_video_is_a_file_or_its_frames(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"film")
    message = Message(
        role="user",
        parts=[
            Video(tmp_path / "clip.mp4", sample_fps=1.0),
            Video(b"bytes", max_frames=8),
            Video([b"one", b"two"], fps=4.0),
            "What happens?",
        ],
    )
    path, data, frames, _ = (part.video for part in message.to_proto().parts)
    assert (path.file, path.sample_fps, path.HasField("max_frames")) == (b"film", 1.0, False)
    assert (data.file, data.max_frames, data.HasField("sample_fps")) == (b"bytes", 8, False)
    assert ([image.data for image in frames.frames.images], frames.frames.fps) == ([b"one", b"two"], 4.0)


@pytest.mark.parametrize("video", [Video(b""), Video([]), Video([b""]), Video(b"film", fps=2.0)])
def test_a_video_of_nothing_or_of_two_rates_is_refused(video: Video) -> None:
    with pytest.raises(ValueError, match=r"empty|no frames|its own fps"):
        video.to_proto()


def test_videos_come_behind_the_images_of_a_prompt() -> None:
    request = build(prompt="?", images=[b"i"], videos=[b"v", [b"f"]])
    assert kinds(request.messages[0]) == ["image", "video", "video", "text"]
