"""From messages to tensors: what a prompt becomes, and what is refused."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from vlcache.v1 import inference_pb2 as pb

from prefill_worker.preprocess.processing import MAX_BYTES_PER_TOKEN, PromptProcessor
from prefill_worker.prompt import Prompt, PromptBuilder
from shared.errors import ContextTooLongError, InvalidRequestError, ServiceError
from tests.unit.decode_worker.tiny import CONTEXT, VISUAL_TOKENS, processor, tokenizer
from tests.unit.prefill_worker.prompts import QUESTION, encoded, message, picture, user

PICTURE = encoded(picture(1))
IMAGE = tokenizer().convert_tokens_to_ids("<image>")
MAX_IMAGES = 3


def build(builder: PromptBuilder, *messages: pb.Message, max_new_tokens: int = 1) -> Prompt:
    return builder.build(messages, max_new_tokens=max_new_tokens)


def with_processor(builder: PromptBuilder, other: Any) -> PromptBuilder:
    changed = copy.copy(builder)
    changed.processing = PromptProcessor(other, builder.processing._limits)
    return changed


def test_a_prompt_is_the_template_filled_in(builder: PromptBuilder) -> None:
    prompt = build(builder, message("system", "Be brief."), user("Hi"), message("assistant", "Ho"), user("He"))
    text = "<s><|user|>Be brief.<|user|>Hi<|assistant|>Ho</s><|user|>He<|assistant|>"
    ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert prompt.inputs["input_ids"].tolist() == [ids]
    assert set(prompt.inputs) == {"input_ids"}, "no mask: one unpadded prompt"
    assert prompt.position_ids.tolist() == [[*range(len(ids))]]
    assert prompt.next_position == len(ids)
    assert (prompt.shape.num_tokens, prompt.shape.num_visual, prompt.shape.last_visual) == (len(ids), 0, None)
    assert prompt.pixels == ()


def test_a_tokenizer_that_adds_its_own_tokens_adds_none(builder: PromptBuilder) -> None:
    """The template writes the special tokens; a second <s> would change every answer."""
    made = processor()
    made.tokenizer = copy.deepcopy(made.tokenizer)
    adds_bos = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer().bos_token_id)])
    made.tokenizer.backend_tokenizer.post_processor = adds_bos
    assert made.tokenizer("x")["input_ids"][0] == tokenizer().bos_token_id
    prompt = build(with_processor(builder, made), user("Hi"))
    assert prompt.inputs["input_ids"].tolist() == build(builder, user("Hi")).inputs["input_ids"].tolist()


def test_an_image_becomes_its_visual_tokens(builder: PromptBuilder) -> None:
    prompt = build(builder, user(encoded(picture(1, (40, 30))), QUESTION))
    ids = prompt.inputs["input_ids"][0].tolist()
    positions = [at for at, token in enumerate(ids) if token == IMAGE]
    assert len(positions) == VISUAL_TOKENS
    assert (prompt.shape.num_tokens, prompt.shape.num_visual) == (len(ids), VISUAL_TOKENS)
    assert prompt.shape.visual.nonzero().flatten().tolist() == positions
    assert prompt.shape.last_visual == positions[-1]
    seen = processor()(images=[picture(1, (40, 30))], text="<image>", return_tensors="pt")["pixel_values"]
    assert torch.equal(prompt.inputs["pixel_values"], seen)
    assert seen.shape == (1, 3, 28, 28)
    assert prompt.position_ids.tolist() == [[*range(len(ids))]]
    assert prompt.next_position == len(ids)
    assert prompt.pixels == (40 * 30,)


def test_special_tokens_and_punctuation_are_known_by_their_places(builder: PromptBuilder) -> None:
    prompt = build(builder, user(PICTURE, "Red, or blue?"))
    ids = prompt.inputs["input_ids"][0].tolist()
    special = tokenizer().convert_ids_to_tokens([ids[at] for at in prompt.shape.special])
    assert special == ["<s>", "<|user|>", "<|assistant|>"]
    assert tokenizer().decode([ids[at] for at in prompt.shape.punctuation]) == ":,?", "the template writes the first"


def test_several_images_keep_their_order(builder: PromptBuilder) -> None:
    first, second = encoded(picture(1)), encoded(picture(2))
    prompt = build(builder, user(first, "one"), message("assistant", "ok"), user(second, QUESTION))
    alone = [build(builder, user(data, "x")).inputs["pixel_values"][0] for data in (first, second)]
    assert torch.equal(prompt.inputs["pixel_values"], torch.stack(alone))
    assert prompt.shape.num_visual == 2 * VISUAL_TOKENS
    ids = prompt.inputs["input_ids"][0].tolist()
    assert prompt.shape.last_visual == max(at for at, token in enumerate(ids) if token == IMAGE)
    assert prompt.shape.last_visual < len(ids) - 1


def test_an_image_may_come_last(builder: PromptBuilder) -> None:
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}{% endfor %}"
    image_last = with_processor(builder, processor(template))
    prompt = build(image_last, user("Look:", PICTURE))
    assert prompt.shape.last_visual == prompt.shape.num_tokens - 1


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "no text"),
        ([user("")], "no text"),
        ([user(" \n\t\u3000")], "no text"),
        ([user(PICTURE)], "no text"),
        ([message("tool", "hi")], "a role is one of system, user, assistant, not 'tool'"),
        ([message("", "hi")], "a role is one of"),
        ([user("hi"), message("assistant", "ho")], "last message must come from the user"),
        ([message("system", "hi")], "last message must come from the user"),
        ([pb.Message(role="user", parts=[pb.Part(text="hi"), pb.Part()])], "neither text nor image"),
        ([user("hi", *[PICTURE] * (MAX_IMAGES + 1))], "4 images and videos; at most 3"),
        ([user("hi", b"")], "image 1 is empty"),
        ([user("hi", PICTURE, b"GIF89a")], "image 2 is no readable"),
    ],
)
def test_a_bad_conversation_is_refused_with_a_sentence(
    builder: PromptBuilder, messages: list[pb.Message], sentence: str
) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        build(builder, *messages)


@pytest.mark.parametrize("token", ["<s>", "</s>", "<pad>", "<image>", "<|user|>", "<|assistant|>"])
def test_reserved_tokens_cannot_be_forged(builder: PromptBuilder, token: str) -> None:
    whole = user(f"say {token} twice")
    cut = user("say " + token[:3], token[3:] + " twice")
    around_image = user("say " + token[:-1], PICTURE, token[-1:])
    earlier = [message("system", token), user("hi")]
    for messages in ([whole], [cut], [around_image], earlier):
        with pytest.raises(InvalidRequestError, match="reserved token") as caught:
            build(builder, *messages)
        assert repr(token) in caught.value.message
        assert caught.value.reason == "RESERVED_TOKEN"


def test_what_only_resembles_a_reserved_token_is_text(builder: PromptBuilder) -> None:
    for text in ("<image", "< image >", "<IMAGE>", "\uff1cimage\uff1e", "<ima\u200bge>", "<|user|", "&lt;image&gt;"):
        prompt = build(builder, user(text))
        assert prompt.shape.num_visual == 0
        assert f"<|user|>{text}<|assistant|>" in tokenizer().decode(prompt.inputs["input_ids"][0])


def test_prompt_and_answer_must_fit_the_context(builder: PromptBuilder) -> None:
    tokens = build(builder, user(PICTURE, QUESTION)).shape.num_tokens
    build(builder, user(PICTURE, QUESTION), max_new_tokens=CONTEXT - tokens)
    with pytest.raises(ContextTooLongError, match=f"prompt has {tokens} tokens.* max_new_tokens is .*{CONTEXT}"):
        build(builder, user(PICTURE, QUESTION), max_new_tokens=CONTEXT - tokens + 1)


def test_an_absurdly_long_text_is_refused_before_it_is_tokenised(
    builder: PromptBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    processing = builder.processing._processor
    monkeypatch.setattr(type(processing), "__call__", lambda *_, **__: pytest.fail("it was tokenised"))
    half = "x" * (CONTEXT * MAX_BYTES_PER_TOKEN // 2)
    with pytest.raises(ContextTooLongError, match="far longer than the context"):
        build(builder, message("system", half), user(half + "x"))


def test_too_many_images_are_refused_before_one_is_opened(
    builder: PromptBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefill_worker.preprocess.processing.open_images", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(InvalidRequestError, match="at most"):
        build(builder, user("hi", *[PICTURE] * (MAX_IMAGES + 1)))


def test_a_template_that_refuses_is_answered_with_its_reason(builder: PromptBuilder) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        build(with_processor(builder, processor(template)), user("hi"))


# what protobuf strings can hold: everything but lone surrogates
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
PARTS = st.lists(TEXT | st.just(PICTURE), min_size=1, max_size=4)
TURNS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), PARTS), max_size=2)


@given(turns=TURNS, last=PARTS)
def test_any_text_makes_a_prompt_or_a_service_error(
    builder: PromptBuilder, turns: list[tuple[str, list[str | bytes]]], last: list[str | bytes]
) -> None:
    messages = [*(message(role, *parts) for role, parts in turns), user(*last)]
    try:
        prompt = build(builder, *messages)
    except ServiceError:
        return
    ids = prompt.inputs["input_ids"][0].tolist()
    images = sum(isinstance(part, bytes) for _, parts in [*turns, ("user", last)] for part in parts)
    assert ids.count(IMAGE) == images * VISUAL_TOKENS
    assert ids.count(tokenizer().eos_token_id) == sum(role == "assistant" for role, _ in turns)
    # what the router reserves by: a byte is at least as long as a token
    text_bytes = sum(len(part.encode()) for _, parts in [*turns, ("user", last)] for part in parts if part != PICTURE)
    processing = builder.processing
    per_image = processing.image_bounds()[-1].visual_tokens + processing.marker_tokens()
    bound = text_bytes + len(messages) * processing.template_tokens() + images * per_image
    assert len(ids) <= bound
