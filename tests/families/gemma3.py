"""Gemma 3: sliding-window layers, and tokens of one image that see each other in both directions."""

from __future__ import annotations

from transformers import (
    Gemma3Config,
    Gemma3Processor,
    Gemma3TextConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from tests.families.family import HEAD_DIM, Family, text_fields
from tests.families.vocabulary import Vocabulary

SIDE, PATCH, IMAGE_TOKENS, WINDOW = 28, 7, 4, 16
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
IMAGE, BEGIN, END = "<image_soft_token>", "<start_of_image>", "<end_of_image>"
TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<start_of_turn>' ~ ('model' if message.role == 'assistant' else 'user') ~ '\\n' -}}
    {%- if message.content is string -%}{{- message.content -}}{%- else -%}
        {%- for part in message.content -%}
            {{- '<start_of_image>' if part.type == 'image' else part.text -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""


def build_config(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = Gemma3TextConfig(
        head_dim=HEAD_DIM,
        query_pre_attn_scalar=HEAD_DIM,
        sliding_window=WINDOW,
        layer_types=LAYER_TYPES,
        **text_fields(tokenizer),
    )
    return Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=IMAGE_TOKENS,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        boi_token_index=tokenizer.convert_tokens_to_ids(BEGIN),
        eoi_token_index=tokenizer.convert_tokens_to_ids(END),
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    return Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer,
        chat_template=template,
        image_seq_length=IMAGE_TOKENS,
    )


FAMILY = Family(
    name="gemma3",
    image_token=IMAGE,
    vocabulary=Vocabulary(
        bos="<bos>",
        eos="<end_of_turn>",
        pad="<pad>",
        named={"image_token": IMAGE, "boi_token": BEGIN, "eoi_token": END},
        others=("<start_of_turn>",),
    ),
    template=TEMPLATE,
    build_config=build_config,
    build_processor=build_processor,
)
