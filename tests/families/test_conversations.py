"""Conversations of several turns: rendered by each family's own template, answered as transformers does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prefill_worker.compression.rows import post_vision_rows
from shared.model.loading import load_decode_model
from tests.families.chats import QUESTION, SMALL, SYSTEM, TALL, WIDE, Chat, inputs_of
from tests.families.family import Family
from tests.families.prefilling import CPU, Prefilling
from tests.families.test_prefill_to_decode import Decoding
from tests.unit.decode_worker.sequences import advance
from tests.unit.decode_worker.test_engine import Recorded

STEPS = 6
# plainly causal, M-RoPE, windows and masks
ANSWERED = ("llava", "qwen2_vl", "gemma3")
CONVERSATIONS: dict[str, Chat] = {
    "image in an earlier turn": [
        SYSTEM,
        ("user", [WIDE, QUESTION]),
        ("assistant", ["A zebra, and a fox."]),
        ("user", ["Which one is larger?"]),
    ],
    "images in several turns": [
        ("user", [TALL, QUESTION]),
        ("assistant", ["no"]),
        ("user", ["And here?", SMALL, "Compare."]),
        ("assistant", ["They differ."]),
        ("user", ["How?"]),
    ],
    "text after text": [SYSTEM, ("user", ["Hello."]), ("assistant", ["yes"]), ("user", [QUESTION])],
    "parts": [("system", ["Be brief. ", "Be exact."]), ("user", ["First:", SMALL, "What", " is it?"])],
}
every_conversation = pytest.mark.parametrize("kind", CONVERSATIONS)


def told(chat: Chat) -> list[dict[str, Any]]:
    """As users of transformers write it."""
    return [
        {
            "role": role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
                for part in parts
            ],
        }
        for role, parts in chat
    ]


@every_conversation
def test_tokens_are_those_of_the_processors_own_template(prefilling: Prefilling, kind: str) -> None:
    chat = CONVERSATIONS[kind]
    expected = prefilling.loaded.processor.apply_chat_template(
        told(chat), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(prefilling.prompt(chat).inputs["input_ids"], expected["input_ids"])


def test_turns_behind_an_image_are_observed(prefilling: Prefilling) -> None:
    chat = CONVERSATIONS["image in an earlier turn"]
    prompt = prefilling.prompt(chat)
    rows = post_vision_rows(prompt.shape, max_rows=0)
    read = prefilling.loaded.processor.tokenizer.decode(prompt.inputs["input_ids"][0, rows.start :])
    assert prompt.shape.last_visual == rows.start - 1
    assert all(text in read for text in (QUESTION, "A zebra, and a fox.", "Which one is larger?"))


@every_conversation
def test_answers_are_those_of_generate(family: Family, prefilling: Prefilling, kind: str) -> None:
    if family.name not in ANSWERED:
        pytest.skip("as another one")
    decoder = Recorded(load_decode_model(prefilling.loaded.folder, dtype=torch.float32, device=CPU))
    decoding = Decoding(prefilling, decoder)
    _, _, sequence = decoding.bring(CONVERSATIONS[kind], 1.0)
    answer = [sequence.last_token]
    for _ in range(STEPS):
        advance([sequence], decoding.engine.step([sequence]))
        answer.append(sequence.last_token)
    assert answer == prefilling.loaded.answer(inputs_of(prefilling.loaded, CONVERSATIONS[kind]), STEPS + 1)
