"""LLaVA-NeXT: tiles at the best of several resolutions, a newline feature per row of them, Mistral."""

from __future__ import annotations

from transformers import (
    LlavaNextConfig,
    LlavaNextProcessor,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from tests.families.family import Family, text_fields
from tests.families.llava import IMAGE, PATCH, SIDE, clip_tower
from tests.families.vocabulary import Vocabulary

RESOLUTIONS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '' if message.role == 'assistant' else '[INST] ' -}}
    {%- if message.content is string -%}{{- message.content -}}{%- else -%}
        {%- for part in message.content if part.type == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
        {%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
    {%- endif -%}
    {{- eos_token if message.role == 'assistant' else ' [/INST]' -}}
{%- endfor -%}
"""


def build_config(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    return LlavaNextConfig(
        text_config=MistralConfig(sliding_window=None, **text_fields(tokenizer)),
        vision_config=clip_tower(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_grid_pinpoints=RESOLUTIONS,
        image_seq_length=(SIDE // PATCH) ** 2,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_grid_pinpoints=RESOLUTIONS,
        ),
        tokenizer,
        chat_template=template,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


FAMILY = Family(
    name="llava_next",
    image_token=IMAGE,
    vocabulary=Vocabulary(bos="<s>", eos="</s>", pad="<pad>", named={"image_token": IMAGE}),
    template=TEMPLATE,
    build_config=build_config,
    build_processor=build_processor,
    tiles=True,
)
