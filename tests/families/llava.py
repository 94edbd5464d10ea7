"""LLaVA-1.5: a CLIP tower, one row of features per image, Llama."""

from __future__ import annotations

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.families.family import Family, text_fields
from tests.families.vocabulary import Vocabulary

SIDE, PATCH = 28, 14
IMAGE = "<image>"
TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[message.role] -}}
    {%- if message.content is string -%}{{- message.content -}}{%- else -%}
        {%- for part in message.content if part.type == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
        {%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
    {%- endif -%}
    {{- eos_token if message.role == 'assistant' else ' ' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


def clip_tower() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    return LlavaConfig(
        text_config=LlamaConfig(**text_fields(tokenizer)),
        vision_config=clip_tower(),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(SIDE // PATCH) ** 2,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer,
        chat_template=template,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


FAMILY = Family(
    name="llava",
    image_token=IMAGE,
    vocabulary=Vocabulary(bos="<s>", eos="</s>", pad="<pad>", named={"image_token": IMAGE}),
    template=TEMPLATE,
    build_config=build_config,
    build_processor=build_processor,
)
