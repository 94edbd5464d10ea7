"""Idefics3: one span per tile, with text markers of row and column between them, Llama."""

from __future__ import annotations

from typing import Any

from transformers import (
    Idefics3Config,
    Idefics3Processor,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from tests.families.family import Family, text_fields
from tests.families.vocabulary import Vocabulary

SIDE, PATCH, SHUFFLE, GRID = 28, 7, 2, 2
TILE_TOKENS = (SIDE // PATCH // SHUFFLE) ** 2
IMAGE, FAKE, WHOLE, END = "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"
TEMPLATE = """\
{{- '<|im_start|>' -}}
{%- for message in messages -%}
    {{- message.role | capitalize ~ ':' -}}
    {%- if message.content is string -%}{{- ' ' ~ message.content -}}{%- else -%}
        {%- for part in message.content -%}
            {{- '<image>' if part.type == 'image' else ' ' ~ part.text -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<end_of_utterance>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""
VOCABULARY = Vocabulary(
    bos="<|im_start|>",
    eos=END,
    pad="<|endoftext|>",
    named={"image_token": IMAGE, "fake_image_token": FAKE, "global_image_token": WHOLE, "end_of_utterance_token": END},
    others=tuple(f"<row_{row + 1}_col_{column + 1}>" for row in range(GRID) for column in range(GRID)),
)


def tower() -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }


def tile_sizes() -> dict[str, dict[str, int]]:
    """An image fills a grid of `GRID` x `GRID` tiles along its longer side."""
    return {"size": {"longest_edge": GRID * SIDE}, "max_image_size": {"longest_edge": SIDE}}


def build_config(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    return Idefics3Config(
        text_config=LlamaConfig(**text_fields(tokenizer)),
        vision_config=tower(),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        scale_factor=SHUFFLE,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    return Idefics3Processor(
        Idefics3ImageProcessorPil(**tile_sizes()), tokenizer, image_seq_len=TILE_TOKENS, chat_template=template
    )


FAMILY = Family(
    name="idefics3",
    image_token=IMAGE,
    vocabulary=VOCABULARY,
    template=TEMPLATE,
    build_config=build_config,
    build_processor=build_processor,
    tiles=True,
)
