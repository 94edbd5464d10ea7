"""What differs between vision-language architectures, as far as compression and the split care."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from shared.kv.layout import KVLayout

# Attention with extra terms that our attention function does not compute.
UNSUPPORTED_TEXT_FIELDS = ("attn_logit_softcapping", "attn_logit_softcap")
# Rotary frequencies that follow the longest sequence so far: one request would change the tokens of another.
UNSUPPORTED_ROPE_TYPES = ("dynamic", "longrope")
SUPPORTED_MODEL_TYPES = ("llava",)

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""By their names in a `KVLayout`."""
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class UnsupportedModelError(ValueError):
    """The checkpoint's architecture cannot be served."""


@dataclass(frozen=True, kw_only=True)
class VLMSpec:
    """The facts about a vision-language model that the services need."""

    model_type: str
    image_token_id: int
    num_query_heads: int
    context_tokens: int
    vocabulary: int
    image_side: int
    """Pixels per side of the vision tower's input."""
    eos_token_ids: frozenset[int]
    layout: KVLayout

    @classmethod
    def from_config(cls, config: PretrainedConfig, *, eos_token_ids: frozenset[int], dtype: torch.dtype) -> VLMSpec:
        """Reads a Hugging Face configuration.

        Raises:
            UnsupportedModelError: The architecture needs something that is not implemented.
        """
        if config.model_type not in SUPPORTED_MODEL_TYPES:
            known = ", ".join(SUPPORTED_MODEL_TYPES)
            raise UnsupportedModelError(f"model type {config.model_type!r} is not supported; supported: {known}")
        text = config.get_text_config()
        for field in UNSUPPORTED_TEXT_FIELDS:
            if getattr(text, field, None):
                raise UnsupportedModelError(f"the model uses {field}, which is not supported")
        rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type")
        if rope in UNSUPPORTED_ROPE_TYPES:
            raise UnsupportedModelError(f"rotary embeddings of type {rope!r} are not supported")
        if getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
            raise UnsupportedModelError("sliding-window attention is not supported")
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            model_type=config.model_type,
            image_token_id=config.image_token_id,
            num_query_heads=text.num_attention_heads,
            context_tokens=text.max_position_embeddings,
            vocabulary=text.vocab_size,
            image_side=config.vision_config.image_size,
            eos_token_ids=eos_token_ids,
            layout=KVLayout(
                num_layers=text.num_hidden_layers,
                num_kv_heads=text.num_key_value_heads,
                head_dim=head_dim,
                dtype=DTYPE_NAMES[dtype],
            ),
        )
