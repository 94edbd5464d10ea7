"""The architecture: a LLaVA with a 3-layer CLIP tower and an 8-layer Llama, from scratch."""

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from models.shapes_vlm.processor import IMAGE
from models.shapes_vlm.scenes import IMAGE_PX, PATCH_PX

INITIAL_STD = 0.03
MAX_POSITIONS = 8192


def build_config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    text_layers: int = 8,
    text_width: int = 256,
    vision_layers: int = 3,
    vision_width: int = 128,
) -> LlavaConfig:
    """Heads are 32 wide everywhere; two query heads share one KV head."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=text_width,
        intermediate_size=2 * text_width,
        num_hidden_layers=text_layers,
        num_attention_heads=text_width // 32,
        num_key_value_heads=text_width // 64,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        initializer_range=INITIAL_STD,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        **ids,
    )
    vision = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=4 * vision_width,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_width // 32,
        image_size=IMAGE_PX,
        patch_size=PATCH_PX,
    )
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_PX // PATCH_PX) ** 2,
        tie_word_embeddings=False,
        **ids,
    )


def build_model(config: LlavaConfig, *, seed: int) -> LlavaForConditionalGeneration:
    """Random float32 weights; what writes into a residual stream starts smaller, the deeper the tower."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        tower = config.vision_config if "vision_tower" in name else config.text_config
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=INITIAL_STD)
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
            nn.init.normal_(parameter, std=INITIAL_STD / (2 * tower.num_hidden_layers) ** 0.5)
    return model


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Greedy, and stops after the answer."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=64,
    )
