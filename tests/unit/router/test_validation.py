"""What is refused, with which code, and what is filled in."""

from __future__ import annotations

import io

import grpc
import pytest
from PIL import Image
from vlcache.v1 import inference_pb2 as pb
from vlcache.worker.v1 import worker_pb2

from router.validation import AcceptedRequest, accept, request_id_of
from shared.errors import InvalidRequestError
from shared.rpc.status import from_rpc_error
from tests.unit.router.fakes import FakeDecode, FakePrefill, ask, bench, kinds, run, served_model

MODEL = served_model()


def message(role: str = "user", *parts: pb.Part) -> pb.Message:
    return pb.Message(role=role, parts=parts or [pb.Part(text="hello")])


def wire(**values: float) -> pb.CompressionParams:
    return pb.CompressionParams(wire=pb.WireParams(**values))


INVALID = {
    "id with a blank": (ask(request_id="a b"), "request_id"),
    "id too long": (ask(request_id="x" * 129), "request_id"),
    "no message": (pb.GenerateRequest(), "text"),
    "no text": (pb.GenerateRequest(messages=[message("user", pb.Part(image=pb.Image(data=b"x")))]), "text"),
    "blank text": (ask(" \n\t"), "text"),
    "unknown role": (ask(role="robot"), "robot"),
    "no role": (ask(role=""), "role"),
    "empty part": (pb.GenerateRequest(messages=[message(), message("user", pb.Part())]), "part"),
    "empty image": (
        pb.GenerateRequest(messages=[message("user", pb.Part(text="a"), pb.Part(image=pb.Image()))]),
        "no data",
    ),
    "too many images": (ask(images=3), "at most 2 images"),
    "empty video": (
        pb.GenerateRequest(messages=[message("user", pb.Part(text="a"), pb.Part(video=pb.Video(sample_fps=1)))]),
        "neither a file nor frames",
    ),
    "too many images and videos": (
        pb.GenerateRequest(messages=[message("user", *[pb.Part(video=pb.Video(file=b"x"))] * 3, pb.Part(text="a"))]),
        "at most 2 images and videos",
    ),
    "priority below the range": (ask(priority=-101), "priority must lie"),
    "priority above the range": (ask(priority=101), "priority must lie"),
    "too many new tokens": (ask(sampling=pb.SamplingParams(max_new_tokens=65)), "at most 64"),
    "no new tokens": (ask(sampling=pb.SamplingParams(max_new_tokens=0)), "max_new_tokens"),
    "negative temperature": (ask(sampling=pb.SamplingParams(temperature=-1)), "temperature"),
    "top_p of 0": (ask(sampling=pb.SamplingParams(top_p=0)), "top_p"),
    "negative top_k": (ask(sampling=pb.SamplingParams(top_k=-1)), "top_k"),
    "empty stop string": (ask(sampling=pb.SamplingParams(stop=[""])), "stop"),
    "retention of 0": (ask(compression=pb.CompressionParams(retention=0)), "retention"),
    "retention above 1": (ask(compression=pb.CompressionParams(retention=1.5)), "retention"),
    "retention nan": (ask(compression=pb.CompressionParams(retention=float("nan"))), "retention"),
    "no kept tokens": (ask(compression=pb.CompressionParams(max_kept_tokens=0)), "max_kept_tokens"),
    "unknown scope": (ask(compression=pb.CompressionParams(budget_scope=9)), "budget_scope"),
    "bits that do not exist": (ask(compression=wire(bits=5)), "wire.bits is one of 0, 8, 4, 2"),
    "a share of channels above 1": (ask(compression=wire(key_channels=1.5)), "wire.key_channels"),
    "channels nan": (ask(compression=wire(key_channels=float("nan"))), "wire.key_channels"),
    "a group of 1": (ask(compression=wire(bits=4, group=1)), "wire.group"),
    "unknown policy": (ask(compression=pb.CompressionParams(policy="zip")), "vl_cache, streaming"),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_requests_are_refused_with_a_reason_for_humans(name: str) -> None:
    request, hint = INVALID[name]
    check = request_id_of if "request_id" in hint else lambda bad: accept(bad, MODEL)
    with pytest.raises(InvalidRequestError, match=hint):
        check(request)


def test_every_invalid_request_is_invalid_argument_on_the_wire_and_costs_the_workers_nothing() -> None:
    async def main() -> None:
        async with bench() as b:
            for request, hint in INVALID.values():
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await b.stub.Generate(request).read()
                error = from_rpc_error(caught.value)
                assert (error.code, error.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
                assert hint in error.message
            assert b.decode[0].reserves == b.prefill[0].requests == []
            assert b.metric("requests_total", outcome="refused", code="INVALID_ARGUMENT") == len(INVALID)
            assert b.metric("num_requests_running") == 0

    run(main)


def test_a_request_above_the_limit_is_refused() -> None:
    request = ask()
    request.messages[0].parts.add(image=pb.Image(data=bytes(64 << 20)))
    with pytest.raises(InvalidRequestError, match="64 MiB"):
        accept(request, MODEL)


def test_ids_of_every_allowed_character_pass_and_a_missing_one_is_made() -> None:
    fancy = "AZaz09._:-" + "x" * 118
    assert request_id_of(ask(request_id=fancy)) == fancy
    made = {request_id_of(ask()) for _ in range(10)}
    assert len(made) == 10
    assert all(len(name) == 32 and int(name, 16) >= 0 for name in made)


def test_defaults_are_filled_in_so_that_all_workers_agree() -> None:
    accepted = accept(ask(request_id="r"), MODEL)
    filled = accepted.message
    assert filled.model == "toy"
    assert filled.sampling.max_new_tokens == accepted.max_new_tokens == 16
    assert filled.sampling.HasField("seed")
    assert filled.compression.policy == "vl_cache"
    assert filled.compression.retention == 0.1


def test_what_the_client_said_is_kept() -> None:
    sampling = pb.SamplingParams(max_new_tokens=3, temperature=0.5, top_p=0.9, top_k=5, seed=0, stop=["."])
    budget = pb.CompressionParams(policy="streaming", max_kept_tokens=40)
    filled = accept(ask(sampling=sampling, compression=budget), MODEL).message
    assert (filled.sampling.temperature, filled.sampling.top_p, filled.sampling.top_k) == (0.5, 0.9, 5)
    assert filled.sampling.HasField("seed")
    assert filled.sampling.seed == 0
    assert list(filled.sampling.stop) == ["."]
    assert filled.compression.WhichOneof("budget") == "max_kept_tokens"
    assert filled.compression.policy == "streaming"


def test_drawn_seeds_differ() -> None:
    assert len({accept(ask(), MODEL).message.sampling.seed for _ in range(8)}) == 8


def test_the_prompt_is_bounded_by_bytes_images_and_one_template_per_message() -> None:
    text = "wie groß?"
    assert accept(ask(text), MODEL).prompt_tokens_bound == len(text.encode()) + 20
    assert accept(ask(text, images=2), MODEL).prompt_tokens_bound == len(text.encode()) + 20 + 2 * 576
    chat = pb.GenerateRequest(messages=[message("system"), message(), message("assistant")])
    assert accept(chat, MODEL).prompt_tokens_bound == 3 * (len("hello") + 20)


def test_a_loose_bound_is_cut_at_the_context_not_refused() -> None:
    accepted = accept(ask("x" * 100_000), MODEL)
    assert accepted.prompt_tokens_bound == 4096
    assert accepted.offers[0].kept_tokens_bound < 4096


def test_keeping_everything_bounds_the_kept_tokens_by_the_prompt() -> None:
    accepted = accept(ask("x" * 100, compression=pb.CompressionParams(retention=1)), MODEL)
    assert accepted.offers[0].kept_tokens_bound == accepted.prompt_tokens_bound == 120


def test_what_the_template_writes_around_an_image_is_text() -> None:
    """A budget of the visual tokens keeps it, so it must be reserved in full."""
    visual = pb.CompressionParams(retention=0.1, budget_scope=pb.BUDGET_SCOPE_VISUAL)
    text = len("what is it?") + 20 + 2 * 6
    accepted = accept(ask(images=2, compression=visual), MODEL)
    assert accepted.prompt_tokens_bound == text + 2 * 570
    assert accepted.offers[0].kept_tokens_bound == text + 2 * 57 + 16
    assert accept(ask(images=2), MODEL).prompt_tokens_bound == accepted.prompt_tokens_bound
    assert accept(ask("x" * 100_000, images=2, compression=visual), MODEL).offers[0].kept_tokens_bound == 4096


def test_an_image_of_a_known_size_has_a_closer_bound() -> None:
    closer = [worker_pb2.ImageBound(pixels=400, visual_tokens=5), worker_pb2.ImageBound(pixels=900, visual_tokens=9)]
    model = served_model(image_bounds=closer)

    def bound(*images: bytes) -> int:
        parts = [pb.Part(image=pb.Image(data=image)) for image in images]
        asked = pb.GenerateRequest(messages=[message("user", *parts, pb.Part(text="hello"))])
        return accept(asked, model).prompt_tokens_bound - len("hello") - 20 - 6 * len(images)

    for size, tokens in (((20, 20), 5), ((21, 20), 9), ((30, 30), 9), ((30, 31), 570)):
        assert bound(png(*size)) == tokens
        assert bound(png(*size), png(3, 3)) == tokens + 5
    assert bound(b"no header") == 570


def test_a_video_is_bounded_and_keyed_as_images_are() -> None:
    model = served_model(max_tokens_per_video=1030, max_marker_tokens_per_video=30)

    def accepted(*parts: pb.Part, tenant: str = "a") -> AcceptedRequest:
        asked = pb.GenerateRequest(messages=[message("user", *parts, pb.Part(text="hello"))])
        return accept(asked, model, tenant=tenant)

    film, other = (pb.Part(video=pb.Video(file=data)) for data in (b"film", b"other"))
    frames = pb.Part(video=pb.Video(frames=pb.Frames(images=[pb.Image(data=b"film")])))
    assert accepted(film).prompt_tokens_bound == len("hello") + 20 + 1030
    image = pb.Part(image=pb.Image(data=b"no header"))
    assert accepted(film, image).prompt_tokens_bound == len("hello") + 20 + 1030 + 576
    asked = accepted(film), accepted(film, other), accepted(other), accepted(frames), accepted(film, tenant="b")
    keys = [each.image_key for each in asked]
    assert None not in keys
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def two_models() -> tuple[list[FakePrefill], list[FakeDecode]]:
    models: list[worker_pb2.ServedModel] = [served_model("a", compatibility="a"), served_model("b", compatibility="b")]
    prefill = [FakePrefill(f"prefill-{model.name}", model=model) for model in models]
    decode = [FakeDecode(f"decode-{model.name}", model=model) for model in models]
    return prefill, decode


def test_models_are_told_apart() -> None:
    async def main() -> None:
        prefill, decode = two_models()
        async with bench(prefill, decode) as b:
            for name in ("a", "b", "b", "a"):
                events = await b.answer(model=name)
                assert events[0].started.model == name
                placement = events[-1].finished.placement
                assert (placement.prefill_worker, placement.decode_worker) == (f"prefill-{name}", f"decode-{name}")
            listed = (await b.stub.ListModels(pb.ListModelsRequest())).models
            assert [model.name for model in listed] == ["a", "b"]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await b.answer()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "a, b" in caught.value.details()

    run(main)


def test_an_unknown_model_is_not_found_but_only_while_models_are_known() -> None:
    async def main() -> None:
        async with bench() as b:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await b.answer(model="other")
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            assert "toy" in caught.value.details()
            b.prefill[0].info.state = "draining"
            await b.becomes(lambda: b.worker("prefill-0").state == "draining")
            for model in ("toy", "other", ""):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await b.answer(model=model)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            b.prefill[0].info.state = "ready"
            await b.becomes(lambda: b.worker("prefill-0").state == "ready")
            assert kinds(await b.answer())[-1] == "finished"

    run(main)
