import base64

import pytest
from vlcache import Image, Message
from vlcache._openai import as_messages

PNG = b"png bytes"
URI = "data:image/png;base64," + base64.b64encode(PNG).decode()


def test_turns_of_either_form_become_messages():
    found = as_messages(
        [
            {"role": "system", "content": "Be brief."},
            Message(role="user", parts=["Hello."]),
            {"role": "assistant", "content": [{"type": "text", "text": "Hi."}]},
            {"role": "user", "content": [Image(b"one"), "and this?"]},
        ]
    )
    assert [message.role for message in found] == ["system", "user", "assistant", "user"]
    assert [list(message.parts) for message in found] == [
        ["Be brief."],
        ["Hello."],
        ["Hi."],
        [Image(b"one"), "and this?"],
    ]


@pytest.mark.parametrize("image_url", [URI, {"url": URI}, {"url": URI.replace("png", "JPEG")}])
def test_an_image_is_read_from_its_data_uri(image_url):
    (message,) = as_messages([{"role": "user", "content": [{"type": "image_url", "image_url": image_url}]}])
    (image,) = message.parts
    assert image.read() == PNG


def test_no_messages_stay_none():
    assert as_messages(None) is None


def user(*parts):
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize(
    ("message", "error", "reason"),
    [
        ("Hello", TypeError, r"messages\[1\] is a Message or a dict"),
        ({"content": "Hello"}, ValueError, r"messages\[1\] has no role"),
        ({"role": "user"}, ValueError, "has no content"),
        ({"role": "user", "content": None}, TypeError, "a text or a list of parts, not NoneType"),
        ({"role": "user", "content": []}, ValueError, r"messages\[1\]: parts must be"),
        ({"role": "tool", "content": "1"}, ValueError, "role must be one of"),
        ({"role": "user", "content": "Hello", "name": "me"}, ValueError, "has name, which is not supported"),
        (user({"type": "video_url", "video_url": "x"}), ValueError, r"content\[0\]: type must be text or image_url"),
        (user({"type": "text"}), ValueError, r"content\[0\] has no text"),
        (user({"type": "text", "text": 1}), TypeError, "expected a text, got int"),
        (user("Look:", 1), TypeError, r"content\[1\] is a dict, a text, an Image or a Video, not int"),
        (user({"type": "image_url", "image_url": "https://host/a.png"}), ValueError, "fetches nothing"),
        (user({"type": "image_url", "image_url": URI + "?"}), ValueError, "no base64"),
        (user({"type": "image_url", "image_url": {"url": URI, "detail": "low"}}), ValueError, "has detail"),
        (user({"type": "image_url", "image_url": 1}), TypeError, "expected a text, got int"),
    ],
)
def test_another_form_is_refused_by_place(message, error, reason):
    with pytest.raises(error, match=reason):
        as_messages([{"role": "system", "content": "Be brief."}, message])
