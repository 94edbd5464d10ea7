"""Frames between a worker and its preprocessing processes: what is sent arrives, and a lie is found out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prefill_worker.preprocess.image_grid import ImageGrid
from prefill_worker.preprocess.positions import plain_positions
from prefill_worker.preprocess.processed import ProcessedPrompt
from prefill_worker.preprocess.wire import (
    DTYPES,
    MAX_BODY_BYTES,
    MAX_HEADER_BYTES,
    PREFIX,
    Frame,
    FrameError,
    error_frame,
    read_reply,
    read_request,
    reply_frame,
    request_frame,
    sizes,
)
from shared.errors import ContextTooLongError, InternalError, InvalidRequestError, ServiceError
from tests.unit.prefill_worker.prompts import encoded, message, picture, user

PLACES = st.lists(st.integers(0, 1 << 20), max_size=5).map(tuple)
SHARES = st.floats(-2, 2)
GRIDS = st.builds(
    ImageGrid,
    first_token=st.integers(0, 9999),
    rows=st.integers(1, 99),
    columns=st.integers(1, 99),
    box=st.tuples(SHARES, SHARES, SHARES, SHARES),
)
ARRAYS = st.sampled_from(DTYPES).flatmap(lambda name: hnp.arrays(name, hnp.array_shapes(min_dims=1, max_dims=4)))
PROMPTS = st.builds(
    ProcessedPrompt,
    inputs=st.dictionaries(st.text(max_size=8), ARRAYS, max_size=3),
    special=PLACES,
    punctuation=PLACES,
    seed=st.integers(0, (1 << 64) - 1),
    pixels=PLACES,
    positions=hnp.arrays("int64", hnp.array_shapes(min_dims=2, max_dims=2)),
    views=PLACES,
    grids=st.lists(GRIDS, max_size=2).map(tuple),
)


def received(frame: Frame) -> tuple[Any, memoryview]:
    data = b"".join(bytes(piece) for piece in frame.pieces())
    header, body = sizes(data[: PREFIX.size])
    assert len(data) == PREFIX.size + header + body
    return json.loads(data[PREFIX.size : PREFIX.size + header]), memoryview(bytearray(data[PREFIX.size + header :]))


@given(PROMPTS)
def test_a_prompt_arrives_as_it_was(prompt: ProcessedPrompt) -> None:
    arrived = read_reply(*received(reply_frame(prompt)))
    assert arrived.inputs.keys() == prompt.inputs.keys()
    for name, array in prompt.inputs.items():
        assert arrived.inputs[name].dtype == array.dtype
        assert arrived.inputs[name].flags.aligned
        np.testing.assert_array_equal(arrived.inputs[name], array)
    np.testing.assert_array_equal(arrived.positions, prompt.positions)
    for field in ("special", "punctuation", "seed", "pixels", "views", "grids"):
        assert getattr(arrived, field) == getattr(prompt, field)


def test_a_request_arrives_as_it_was() -> None:
    messages = [message("system", "Be brief."), user(encoded(picture(1)), "what?", encoded(picture(2)), "")]
    assert read_request(*received(request_frame(messages, max_new_tokens=7))) == (messages, 7)
    assert read_request(*received(request_frame([], max_new_tokens=1))) == ([], 1)


@pytest.mark.parametrize("kind", [InvalidRequestError, ContextTooLongError, InternalError])
def test_an_error_arrives_as_it_was(kind: type[ServiceError]) -> None:
    with pytest.raises(kind, match=r"^too odd$") as caught:
        read_reply(*received(error_frame(kind("too odd", reason="ODD"))))
    assert type(caught.value) is kind
    assert caught.value.reason == "ODD"


GOOD = reply_frame(
    ProcessedPrompt(
        inputs={"input_ids": np.arange(6)[None]},
        special=(0,),
        punctuation=(),
        seed=1,
        pixels=(),
        positions=plain_positions(6),
    )
)


POSITIONS = ["positions", "int64", [1, 6]]


@pytest.mark.parametrize(
    "lie",
    [
        {"error": "SystemExit", "message": "", "reason": ""},
        {"error": "InvalidRequestError"},
        {"arrays": None},
        {"arrays": [["input_ids", "object", [1, 6]], POSITIONS]},
        {"arrays": [["input_ids", "int64", [1, 7]], POSITIONS]},
        {"arrays": [["input_ids", "int64", [1, 5]], POSITIONS]},
        {"arrays": [["input_ids", "int64", [-1, -6]], POSITIONS]},
        {"arrays": [["input_ids", "int64", [1 << 40, 1 << 40]], POSITIONS]},
        {"arrays": [["input_ids", "int64", ["6"]], POSITIONS]},
        {"arrays": []},
        {"special": 3},
        {"special": ["x"]},
        {"grids": [{"first_token": 1}]},
        {"grids": [{"first_token": 1, "rows": 1, "columns": 1, "box": [0, 1]}]},
        {"seed": None},
    ],
)
def test_a_reply_that_contradicts_itself_is_found_out(lie: dict[str, Any]) -> None:
    header, body = received(GOOD)
    read_reply(header, body)
    with pytest.raises(FrameError):
        read_reply({**header, **lie}, body)


@pytest.mark.parametrize("counts", [(MAX_HEADER_BYTES + 1, 0), (0, MAX_BODY_BYTES + 1), (0, (1 << 64) - 1)])
def test_absurd_sizes_are_refused_before_there_is_memory_for_them(counts: tuple[int, int]) -> None:
    with pytest.raises(FrameError):
        sizes(PREFIX.pack(*counts))
    assert sizes(PREFIX.pack(MAX_HEADER_BYTES, MAX_BODY_BYTES)) == (MAX_HEADER_BYTES, MAX_BODY_BYTES)


def checked(ids: Any, positions: Any = None, grids: Any = None, **places: tuple[int, ...]) -> None:
    values: dict[str, Any] = {"special": (), "punctuation": (), **places}
    ids = np.asarray(ids)
    inputs = {"input_ids": ids} if grids is None else {"input_ids": ids, "image_grid_thw": np.asarray(grids)}
    values["positions"] = np.arange(ids.size)[None] if positions is None else positions
    prompt = ProcessedPrompt(inputs=inputs, seed=0, pixels=(), **values)
    prompt.check(vocabulary=10)


def test_tokens_and_places_that_cannot_be_are_refused() -> None:
    checked([[0, 9, 3]], special=(0, 2), punctuation=(1,))
    for ids in ([[10]], [[-1]], [0, 1], [[0], [1]], [[0.0]], [[[0]]], np.zeros((1, 0), np.int64)):
        with pytest.raises(ValueError):
            checked(ids)
    for places in ({"special": (3,)}, {"punctuation": (-1,)}, {"special": (0, 7)}):
        with pytest.raises(ValueError):
            checked([[0, 9, 3]], **places)


def test_positions_and_views_that_cannot_be_are_refused() -> None:
    checked([[0, 9, 3]], np.array([[0, 1, 2], [0, 0, 1], [2, 1, 0]]), views=(1, 4))
    # a video that lasts longer than it has tokens
    checked([[0, 9, 3]], np.array([[0, 900, 901], [0, 1, 2], [0, 1, 2]]))
    for positions in (
        [[0, 1, 3]],
        [[0, 1, 1 << 24]] * 3,
        [[0, -1, 2]],
        [[0, 1]],
        [0, 1, 2],
        [[0, 1, 2]] * 2,
        [[0.0, 1.0, 2.0]],
    ):
        with pytest.raises(ValueError):
            checked([[0, 9, 3]], np.array(positions))
    for views in ((0,), (1, -1)):
        with pytest.raises(ValueError):
            checked([[0, 9, 3]], views=views)


def test_grids_that_are_not_those_of_the_images_are_refused() -> None:
    checked([[0, 9, 3]], grids=[[1, 2, 4], [1, 2, 2]], views=(8, 4))
    for grids in ([[1, 2, 4]], [[1, 2, 4], [1, 2, 3]], [[-1, -2, 4], [1, 2, 2]], [[1.0, 2, 4], [1, 2, 2]], [[8], [4]]):
        with pytest.raises(ValueError):
            checked([[0, 9, 3]], grids=grids, views=(8, 4))
