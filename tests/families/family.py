"""What makes a tiny checkpoint of a model family, and the making."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.utils import logging

from tests.families.vocabulary import Vocabulary, build_tokenizer

SEED = 0
# Large enough that attention is not uniform: the image must change the answer.
GAIN = 1.3
# A tied embedding that fills the residual stream would make every token repeat itself.
TIED_GAIN = 0.05

# The language model of every family; `text_fields` are their names in a configuration.
LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 16
WIDTH = QUERY_HEADS * HEAD_DIM
CONTEXT = 1024

# Features for deeper layers, or windows: policies that change the pass are refused.
REFUSE_SPARSE = ("qwen3_vl", "gemma3")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family of transformers.

    Attributes:
        name: Its `model_type`.
        image_token: Stands for one image feature in an expanded prompt.
        template: Jinja; messages with parts of type text and image.
        build_config: Of the whole model, for a tokenizer.
        build_processor: Around a tokenizer, with the chat template.
        tiles: Whether a large image becomes several.
        mrope: Whether a token has a position in time, height and width.
    """

    name: str
    image_token: str
    vocabulary: Vocabulary
    template: str
    build_config: Callable[[PreTrainedTokenizerFast], PretrainedConfig]
    build_processor: Callable[[PreTrainedTokenizerFast, str], ProcessorMixin]
    tiles: bool = False
    mrope: bool = False

    def save(self, folder: Path) -> None:
        """Writes weights, configuration, processor, chat template and generation settings."""
        logging.disable_progress_bar()
        tokenizer = build_tokenizer(self.vocabulary)
        processor = self.build_processor(tokenizer, self.template)
        model = random_model(self.build_config(tokenizer))
        model.generation_config = generation_config(tokenizer)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


def text_fields(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Sizes and special tokens of a language model that all families have."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": QUERY_HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """Float32 weights that are the same in every run; norms and biases stay as they are initialised."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=GAIN * parameter[0].numel() ** -0.5)
        if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
            torch.nn.init.normal_(model.get_input_embeddings().weight, std=TIED_GAIN * WIDTH**-0.5)
    return model.eval()


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Greedy."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
