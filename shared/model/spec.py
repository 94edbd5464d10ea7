"""What differs between vision-language architectures, as far as compression and the split care."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from shared.kv.layout import KVLayout
from shared.model.support import check_supported, layer_windows

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""By their names in a `KVLayout`."""
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class VLMSpec:
    """The facts about a vision-language model that the services need.

    Attributes:
        video_token_id: What stands for a feature of a video; None where the model names none.
        tokens_per_second: Temporal positions per second of a video; None where they count its patches.
    """

    model_type: str
    image_token_id: int
    num_query_heads: int
    context_tokens: int
    vocabulary: int
    eos_token_ids: frozenset[int]
    layout: KVLayout
    video_token_id: int | None = None
    tokens_per_second: float | None = None

    @property
    def visual_token_ids(self) -> tuple[int, ...]:
        """What stands for a feature of an image or a video."""
        return (self.image_token_id,) if self.video_token_id is None else (self.image_token_id, self.video_token_id)

    @classmethod
    def from_config(cls, config: PretrainedConfig, *, eos_token_ids: frozenset[int], dtype: torch.dtype) -> VLMSpec:
        """Reads a Hugging Face configuration.

        Raises:
            UnsupportedModelError: The architecture needs something that is not implemented.
        """
        check_supported(config)
        text = config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            model_type=config.model_type,
            image_token_id=config.image_token_id,
            num_query_heads=text.num_attention_heads,
            context_tokens=text.max_position_embeddings,
            vocabulary=text.vocab_size,
            eos_token_ids=eos_token_ids,
            layout=KVLayout(
                num_layers=text.num_hidden_layers,
                num_kv_heads=text.num_key_value_heads,
                head_dim=head_dim,
                dtype=DTYPE_NAMES[dtype],
                windows=layer_windows(text),
            ),
            video_token_id=getattr(config, "video_token_id", None),
            tokens_per_second=getattr(getattr(config, "vision_config", None), "tokens_per_second", None),
        )
