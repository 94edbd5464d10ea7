"""Whatever JSON a client sends is converted or refused; nothing else happens."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from router.http.fields import REFUSED, Ignored, check_fields
from router.http.messages import to_messages
from router.http.remote_images import RemoteImages
from router.http.requests import to_request
from router.http.schema import ChatRequest, parse
from router.validation import accept
from shared.errors import ServiceError
from tests.unit.router.fakes import served_model

NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 2**31, 2**32, 2**63, 2**64, 1e308])
TEXTS = st.text(max_size=20) | st.sampled_from(["toy", "vl_cache", "cache", "user", "data:image/png;base64,QQ=="])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=10,
)
URLS = st.sampled_from(["data:image/png;base64,QQ==", "data:video/jpeg;base64,QQ==,QQ==", "http://a/", "data:"]) | TEXTS
PARTS = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}),
    st.fixed_dictionaries({"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": URLS}) | URLS}),
    st.fixed_dictionaries({"type": st.just("video_url"), "video_url": URLS}),
    VALUES,
)
MESSAGES = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "system", "developer", "assistant", "tool"]),
        "content": TEXTS | st.lists(PARTS, max_size=3),
    },
    optional={"tool_calls": VALUES, "name": VALUES},
)
FIELDS = st.dictionaries(st.sampled_from([*ChatRequest.model_fields, *REFUSED, "another"]), VALUES, max_size=5)


@given(messages=st.lists(MESSAGES, max_size=3) | VALUES, fields=FIELDS)
def test_it_is_taken_or_refused(messages: Any, fields: dict[str, Any]) -> None:
    async def convert(asked: ChatRequest) -> None:
        message = to_request(asked)
        message.messages.extend(await to_messages(asked.messages, RemoteImages(())))
        accept(message, served_model())

    body = json.dumps({"messages": messages, **fields}).encode()
    with contextlib.suppress(ServiceError):
        asked = parse(body)
        check_fields(asked, Ignored())
        asyncio.run(convert(asked))


@given(body=st.binary(max_size=200))
def test_any_bytes_at_all(body: bytes) -> None:
    with contextlib.suppress(ServiceError):
        parse(body)
