"""The chat API as its users have it: OpenAI's own client, against real processes."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import ssl
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import jsonschema
import openai
import pytest
import vlcache
from PIL import Image
from vlcache.certs.authority import make_certificates

from deploy.local.forks import Forks
from models.shapes_vlm.questions import draw_samples
from tests.integration.conftest import stack_config
from tests.integration.running_stack import RunningStack

MODEL = "shapes-vlm"
QUESTIONS = [(sample.question, sample.images) for sample in draw_samples(seed=990_044, count=3)]
LONG = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def stack(forks: Forks) -> Iterator[RunningStack]:
    """TLS everywhere, a token for clients, and parcels in shared memory."""
    with RunningStack(stack_config("auto", secure=True, http_port=0), forks) as stack:
        yield stack
    assert stack.clean, "a process did not end with exit code 0"


def options(stack: RunningStack, **more: Any) -> dict[str, Any]:
    return {"base_url": stack.base_url, "api_key": stack.credentials.token, "max_retries": 0, "timeout": 60, **more}


def trust(stack: RunningStack) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(stack.credentials.ca))


@pytest.fixture
def client(stack: RunningStack) -> Iterator[openai.OpenAI]:
    http = httpx.Client(verify=trust(stack), trust_env=False)
    with openai.OpenAI(**options(stack), http_client=http) as client:
        yield client
    stack.wait_idle()


def async_client(stack: RunningStack) -> openai.AsyncOpenAI:
    http = httpx.AsyncClient(verify=trust(stack), trust_env=False)
    return openai.AsyncOpenAI(**options(stack), http_client=http)


def uri(image: Image.Image | bytes) -> str:
    if isinstance(image, Image.Image):
        out = io.BytesIO()
        image.save(out, format="PNG")
        image = out.getvalue()
    return "data:image/png;base64," + base64.b64encode(image).decode()


def about(question: str, images: Sequence[Image.Image | bytes]) -> list[Any]:
    parts = [{"type": "image_url", "image_url": {"url": uri(image)}} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_answers_are_those_of_the_grpc_api(stack: RunningStack, client: openai.OpenAI) -> None:
    with stack.client() as grpc_client:
        for question, images in QUESTIONS:
            expected = grpc_client.generate(question, images=images, compression=vlcache.Compression(retention=0.2))
            answer = client.chat.completions.create(
                model=MODEL, messages=about(question, images), extra_body={"retention": 0.2}
            )
            choice, usage = answer.choices[0], answer.usage
            assert choice.message.content == expected.text
            assert choice.finish_reason == expected.finish_reason.value
            assert usage is not None
            assert usage.prompt_tokens == expected.usage.prompt_tokens
            assert usage.completion_tokens == expected.usage.generated_tokens
            kv = usage.model_extra["kv"]
            assert (kv["full_bytes"], kv["kept_bytes"]) == (
                expected.compression.full_bytes,
                expected.compression.kept_bytes,
            )
            assert kv["saved_bytes"] == kv["full_bytes"] - kv["kept_bytes"] > 0
            assert kv["transport"] == "memory"


def test_a_stream_is_the_whole_answer(client: openai.OpenAI) -> None:
    question, images = QUESTIONS[0]
    whole = client.chat.completions.create(model=MODEL, messages=about(question, images))
    stream = client.chat.completions.create(
        model=MODEL, messages=about(question, images), stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.choices[0].finish_reason
    assert last.choices == []
    assert _but_sent(last.usage) == _but_sent(whole.usage)


def _but_sent(usage: Any) -> Any:
    """A manifest names the request: its bytes are those of the id as well."""
    said = usage.model_dump()
    assert said["kv"].pop("sent_bytes") > said["kv"]["kept_bytes"]
    return said


def test_several_answers_of_one_prompt(stack: RunningStack, client: openai.OpenAI) -> None:
    question, images = QUESTIONS[0]
    asked: dict[str, Any] = {"model": MODEL, "messages": about(question, images), "n": 3, "seed": 7, "temperature": 1.5}
    whole = client.chat.completions.create(**asked)
    with stack.client() as grpc_client:
        sampling = vlcache.Sampling(n=3, seed=7, temperature=1.5)
        expected = grpc_client.generate(question, images=images, sampling=sampling)
    texts = [choice.message.content for choice in whole.choices]
    assert texts == [choice.text for choice in expected.choices]
    assert len(set(texts)) > 1
    assert whole.usage.completion_tokens == expected.usage.generated_tokens
    streamed = ["", "", ""]
    ends: list[int] = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            ends += [choice.index] if choice.finish_reason else []
    assert streamed == texts
    assert sorted(ends) == [0, 1, 2]


def test_answers_of_a_given_form(client: openai.OpenAI) -> None:
    question, images = QUESTIONS[0]
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "sure": {"type": "boolean"}},
        "required": ["colour", "sure"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "seen", "schema": schema}}
    asked: dict[str, Any] = {"model": MODEL, "messages": about(question, images), "max_tokens": 200}
    answer = client.chat.completions.create(**asked, response_format=form)
    assert jsonschema.validate(json.loads(answer.choices[0].message.content), schema) is None
    chosen = client.chat.completions.create(**asked, extra_body={"guided_choice": ["a.b", "c|d"]})
    assert chosen.choices[0].message.content in ("a.b", "c|d")
    matched = client.chat.completions.create(**asked, extra_body={"guided_regex": "[A-F]{3}-[0-9]{2}"})
    assert re.fullmatch("[A-F]{3}-[0-9]{2}", matched.choices[0].message.content)
    with pytest.raises(openai.BadRequestError, match="regex cannot be followed"):
        client.chat.completions.create(**asked, extra_body={"guided_regex": "("})


def test_which_tokens_were_kept(stack: RunningStack, client: openai.OpenAI) -> None:
    question, images = QUESTIONS[1]
    with stack.client() as grpc_client:
        expected = grpc_client.generate(question, images=images, compression=vlcache.Compression(explain=True))
    assert expected.compression is not None
    assert expected.compression.kept is not None
    answer = client.chat.completions.create(model=MODEL, messages=about(question, images), extra_body={"explain": True})
    assert answer.usage is not None
    kept = answer.usage.model_extra["kv"]["kept"]
    assert [tuple(base64.b64decode(layer)) for layer in kept["layers"]] == list(expected.compression.kept.layers)
    assert [tuple(grid["box"]) for grid in kept["images"]] == [grid.box for grid in expected.compression.kept.images]
    assert kept["attention"] == list(expected.compression.layer_attention_mass)


def test_many_at_once_through_the_async_client(stack: RunningStack) -> None:
    async def main() -> list[str]:
        async with async_client(stack) as client:
            asked = [
                client.chat.completions.create(model=MODEL, messages=about(question, images))
                for question, images in QUESTIONS * 3
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    answers = asyncio.run(main())
    assert answers[:3] == answers[3:6] == answers[6:]
    stack.wait_idle()


def test_logprobs_stop_and_sampling(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": about("Describe it.", QUESTIONS[0][1]), "seed": 5, **LONG}
    answer = client.chat.completions.create(**{**asked, "max_tokens": 12}, logprobs=True, top_logprobs=3, temperature=1)
    again = client.chat.completions.create(**{**asked, "max_tokens": 12}, temperature=1)
    choice = answer.choices[0]
    text = choice.message.content
    assert again.choices[0].message.content == text
    assert choice.finish_reason == "length"
    assert len(choice.logprobs.content) == 12
    # the text has no token that ends one
    assert "".join(token.token for token in choice.logprobs.content).replace("</s>", "") == text
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3
        assert bytes(token.bytes).decode() == token.token
        assert token.logprob <= token.top_logprobs[0].logprob <= 0
    stop = choice.logprobs.content[5].token
    stopped = client.chat.completions.create(**{**asked, "max_tokens": 12}, temperature=1, stop=[stop])
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_errors_are_the_clients_own(stack: RunningStack, client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    hello: list[Any] = [{"role": "user", "content": "Hello"}]
    with pytest.raises(openai.BadRequestError) as caught:
        create(model=MODEL, messages=hello, temperature=-1)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id
    with pytest.raises(openai.BadRequestError, match="tools: this is not served"):
        create(model=MODEL, messages=hello, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.NotFoundError) as unknown:
        create(model="gpt-5", messages=hello)
    assert unknown.value.code == "model_not_found"
    for image in (b"no image", b""):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="image"):
                create(model=MODEL, messages=about("What?", [image]), stream=stream)
    with pytest.raises(openai.BadRequestError) as long:
        create(model=MODEL, messages=[{"role": "user", "content": "word " * 20_000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    part: Any = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    with pytest.raises(openai.BadRequestError, match="fetches nothing"):
        create(model=MODEL, messages=[{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}])


def test_the_id_is_the_clients_and_a_repetition_is_answered_once_more(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": about(*QUESTIONS[1])}
    ours = {"extra_headers": {"x-request-id": "openai-1"}}
    first = client.chat.completions.create(**asked, **ours)
    assert (first._request_id, first.id) == ("openai-1", "chatcmpl-openai-1")
    assert client.chat.completions.create(**asked, **ours).choices == first.choices
    with pytest.raises(openai.ConflictError):
        client.chat.completions.create(**asked, **ours, temperature=1)


def test_a_client_that_leaves_leaves_nothing(stack: RunningStack) -> None:
    async def main() -> None:
        async with async_client(stack) as client:
            messages: Any = [{"role": "user", "content": "Say something."}]
            stream = await client.chat.completions.create(model=MODEL, messages=messages, stream=True, **LONG)
            async for _ in stream:
                break
            await stream.close()
            waiting = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=messages, **LONG))
            await asyncio.sleep(0.2)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert waiting.cancelled()

    asyncio.run(main())
    stack.wait_idle()
    assert 'outcome="cancelled"' in stack.metrics("router")


def test_a_certificate_is_followed(stack: RunningStack, client: openai.OpenAI) -> None:
    """uvloop's own TLS, unlike that of the unit tests."""
    shown = [ssl.get_server_certificate(_address(stack))]
    make_certificates(stack.credentials.folder, hosts=["127.0.0.1", "localhost"])
    shown.append(ssl.get_server_certificate(_address(stack)))
    assert shown[0] != shown[1]
    assert [model.id for model in client.models.list()] == [MODEL]


def _address(stack: RunningStack) -> tuple[str, int]:
    url = httpx.URL(stack.base_url)
    assert url.port is not None
    return url.host, url.port
