"""Events of an answer as OpenAI's JSON, whole and in chunks, with one choice and with several."""

from __future__ import annotations

import math
from typing import Any

from vlcache.v1 import inference_pb2 as pb

from router.http.completion import Chunks, Completion
from tests.unit.router.http.served import events_of

KV = {
    "full_bytes": 1000,
    "kept_bytes": 100,
    "saved_bytes": 900,
    "sent_bytes": 120,
    "retention": 0.5,
    "policy": "vl_cache",
    "transport": "memory",
}


def event(**fields: Any) -> pb.GenerateResponse:
    return pb.GenerateResponse(**fields)


def delta(text: str, choice: int = 0, reason: int = 0, **more: Any) -> pb.GenerateResponse:
    return event(delta=pb.Delta(text=text, token_ids=[1], choice=choice, finish_reason=reason, **more))


STARTED = event(started=pb.Started(request_id="r-1", model="toy"))
COMPRESSION = event(
    compression=pb.Compression(policy="vl_cache", realised_retention=0.5, full_bytes=1000, kept_bytes=100)
)
TRANSFER = event(transfer=pb.Transfer(transport="memory", sent_bytes=120))
FINISHED = event(finished=pb.Finished(usage=pb.Usage(prompt_tokens=50, visual_tokens=40, generated_tokens=6)))
SEVERAL = [
    STARTED,
    delta("A", 0),
    delta("X", 1),
    COMPRESSION,
    delta("B", 0),
    TRANSFER,
    delta("Y", 1, pb.FINISH_REASON_STOP),
    delta("Z", 2, pb.FINISH_REASON_LENGTH),
    delta("C", 0, pb.FINISH_REASON_LENGTH),
    FINISHED,
]
USAGE = {
    "prompt_tokens": 50,
    "completion_tokens": 6,
    "total_tokens": 56,
    "prompt_tokens_details": {"image_tokens": 40},
    "kv": KV,
}


def whole(*events: pb.GenerateResponse) -> dict[str, Any]:
    completion = Completion()
    for each in events:
        completion.add(each)
    return completion.json()


def chunks(*events: pb.GenerateResponse, include_usage: bool = False) -> list[Any]:
    made = Chunks(include_usage=include_usage)
    return events_of(b"".join(chunk for each in events for chunk in made.of(each)).decode())


def test_several_choices_whole() -> None:
    answer = whole(*SEVERAL)
    assert (answer["id"], answer["object"], answer["model"]) == ("chatcmpl-r-1", "chat.completion", "toy")
    assert answer["usage"] == USAGE
    assert [
        (each["index"], each["message"]["role"], each["message"]["content"], each["finish_reason"])
        for each in answer["choices"]
    ] == [(0, "assistant", "ABC", "length"), (1, "assistant", "XY", "stop"), (2, "assistant", "Z", "length")]


def test_several_choices_in_chunks() -> None:
    *said, usage, done = chunks(*SEVERAL, include_usage=True)
    assert done == "[DONE]"
    assert (usage["choices"], usage["usage"]) == ([], USAGE)
    assert {(each["id"], each["object"], each["model"], each["usage"]) for each in said} == {
        ("chatcmpl-r-1", "chat.completion.chunk", "toy", None)
    }
    choices = [choice for each in said for choice in each["choices"]]
    assert [(each["index"], each["delta"], each["finish_reason"]) for each in choices] == [
        (0, {"role": "assistant", "content": "A"}, None),
        (1, {"role": "assistant", "content": "X"}, None),
        (0, {"content": "B"}, None),
        (1, {"content": "Y"}, "stop"),
        (2, {"role": "assistant", "content": "Z"}, "length"),
        (0, {"content": "C"}, "length"),
    ]


def test_usage_only_where_it_is_wanted() -> None:
    *said, done = chunks(*SEVERAL)
    assert done == "[DONE]"
    assert all(each["choices"] and "usage" not in each for each in said)


def test_an_open_character_is_no_chunk_but_an_end_is() -> None:
    said = chunks(STARTED, delta(""), delta("é"), delta("", reason=pb.FINISH_REASON_STOP), FINISHED)
    assert [each["choices"][0]["delta"]["content"] for each in said[:-1]] == ["é", ""]
    assert said[-2]["choices"][0]["finish_reason"] == "stop"


def test_which_tokens_were_kept_is_told_whole_and_in_the_last_chunk() -> None:
    told = pb.GenerateResponse()
    told.CopyFrom(COMPRESSION)
    told.compression.layer_attention_mass.extend([0.5, 0.25])
    told.compression.kept.CopyFrom(
        pb.KeptTokens(
            num_kv_heads=2,
            layers=[bytes([0, 2, 1]), bytes([255, 0, 0])],
            images=[pb.ImageGrid(first_token=1, rows=1, columns=2, left=-0.5, top=0, right=1.5, bottom=1)],
        )
    )
    kept = {
        "num_kv_heads": 2,
        "layers": ["AAIB", "/wAA"],
        "attention": [0.5, 0.25],
        "images": [{"first_token": 1, "rows": 1, "columns": 2, "box": [-0.5, 0, 1.5, 1]}],
    }
    events = [STARTED, delta("A", reason=pb.FINISH_REASON_STOP), told, TRANSFER, FINISHED]
    assert whole(*events)["usage"] == USAGE | {"kv": KV | {"kept": kept}}
    assert chunks(*events, include_usage=True)[-2]["usage"]["kv"]["kept"] == kept


def test_an_answer_that_the_first_token_ends_has_no_transfer() -> None:
    kv = whole(STARTED, delta("A", reason=pb.FINISH_REASON_STOP), COMPRESSION, FINISHED)["usage"]["kv"]
    assert kv == KV | {"sent_bytes": None, "transport": None}


def logprobs(*texts: str) -> pb.TokenLogprobs:
    tokens = [
        pb.TokenLogprob(token_id=number, text=text, logprob=[-0.5, -1.5, -math.inf][number])
        for number, text in enumerate(texts)
    ]
    return pb.TokenLogprobs(token=tokens[0], top=tokens)


def test_logprobs_whole_and_in_chunks() -> None:
    token = {"token": "é", "logprob": -0.5, "bytes": [0xC3, 0xA9]}
    part = {"token": "�", "logprob": -1.5, "bytes": None}
    never = {"token": "b", "logprob": -9999.0, "bytes": [0x62]}
    expected = {"content": [token | {"top_logprobs": [token, part, never]}], "refusal": None}
    events = (STARTED, delta("é", reason=pb.FINISH_REASON_STOP, logprobs=[logprobs("é", "�", "b")]), FINISHED)
    assert whole(*events)["choices"][0]["logprobs"] == expected
    assert chunks(*events)[0]["choices"][0]["logprobs"] == expected
    assert whole(STARTED, delta("a"), FINISHED)["choices"][0]["logprobs"] is None
