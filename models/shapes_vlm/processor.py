"""Builds the tokenizer, the chat template and the LlavaProcessor around them.

The byte-level BPE is trained on the task wordings without their codes: every word of a task becomes one token,
codes and digits stay character by character, and any UTF-8 text round-trips.
"""

import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from models.shapes_vlm.questions import INSTRUCTIONS, WORDINGS
from models.shapes_vlm.scenes import COLOUR_NAMES, IMAGE_PX, PATCH_PX
from models.shapes_vlm.stamps import SHAPE_KINDS

BOS, EOS, PAD, IMAGE, USER, ASSISTANT = "<s>", "</s>", "<pad>", "<image>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, IMAGE, USER, ASSISTANT)
MAX_VOCABULARY = 1024

CHAT_TEMPLATE = """\
{{- '<s>' -}}
{%- set state = namespace(images=0) -%}
{%- for message in messages -%}
    {{- '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] if part['type'] == 'image' -%}
            {%- set state.images = state.images + 1 -%}
            {{- 'Image ' ~ state.images ~ ':<image>' -}}
        {%- endfor -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}
            {{- part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}{{- '</s>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def build_processor() -> LlavaProcessor:
    """The processor that is saved beside the weights."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_PX},
        crop_size={"height": IMAGE_PX, "width": IMAGE_PX},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[IMAGE, USER, ASSISTANT],
        extra_special_tokens={"image_token": IMAGE},
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def _corpus() -> list[str]:
    """Every sentence frame and word of the tasks, but no code: capitals in a row must never merge."""
    frames = [text for wordings in WORDINGS.values() for wording in wordings for text in wording]
    frames = [re.sub(r"\{\w+\}", "", frame) for frame in frames]
    words = [f" {word} {word}," for word in (*COLOUR_NAMES, *SHAPE_KINDS)]
    return 4 * [*frames, *INSTRUCTIONS, *words, "Image :"]
