"""Which architectures can be served, read from a configuration before any weight; others are refused with the reason.

What a configuration does not tell, `trial.py` finds out from the loaded model.
"""

from __future__ import annotations

from collections.abc import Iterator

import transformers
from transformers import PretrainedConfig, PreTrainedModel

# Terms that some families add to the logits; the observed statistics and the decode kernels do not compute them.
CAPPED_LOGITS = ("attn_logit_softcapping", "attn_logit_softcap")
# Rotary frequencies that follow the longest sequence so far: one request would change the tokens of another.
UNSUPPORTED_ROPE_TYPES = ("dynamic", "longrope")
FULL, SLIDING = "full_attention", "sliding_attention"
# What layers of other kinds would need.
LAYER_NEEDS = {
    "linear": "its state would have to be shipped beside the KV",
    "mamba": "its state would have to be shipped beside the KV",
    "recurrent": "its state would have to be shipped beside the KV",
    "conv": "its state would have to be shipped beside the KV",
    "chunked": "the decode kernels would have to know where a chunk begins",
}


class UnsupportedModelError(ValueError):
    """The checkpoint's architecture cannot be served."""


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """transformers' class of a whole vision-language model.

    Raises:
        UnsupportedModelError: It has none, or the architecture cannot be served.
    """
    classes = transformers.AutoModelForImageTextToText._model_mapping
    if type(config) not in classes:
        raise UnsupportedModelError(f"{config.model_type!r} is no vision-language model that transformers knows")
    check_supported(config)
    return classes[type(config)]


def check_supported(config: PretrainedConfig) -> None:
    """Refuses what would be computed wrongly.

    Raises:
        UnsupportedModelError: With the first reason, and what would be needed.
    """
    for reason in _reasons(config, config.get_text_config()):
        raise UnsupportedModelError(f"{config.model_type} cannot be served: {reason}")


def layer_windows(text: PretrainedConfig) -> tuple[int, ...]:
    """Of each layer how many tokens a query sees, itself included, 0 for all; empty where every layer sees all.

    Args:
        text: A language model's configuration that is supported.
    """
    window = _window(text)
    if not 0 < window < text.max_position_embeddings:
        return ()
    kinds = getattr(text, "layer_types", None) or [SLIDING] * text.num_hidden_layers
    windows = tuple(window if kind == SLIDING else 0 for kind in kinds)
    return windows if any(windows) else ()


def _reasons(config: PretrainedConfig, text: PretrainedConfig) -> Iterator[str]:
    yield from _of_the_whole(config, text)
    yield from _of_attention(config, text)
    yield from _of_layers(text)


def _of_the_whole(config: PretrainedConfig, text: PretrainedConfig) -> Iterator[str]:
    if config.is_encoder_decoder or text.is_encoder_decoder:
        yield "it is an encoder-decoder, whose decoder attends to an encoder's output; that would have to be shipped"
    if getattr(text, "cross_attention_layers", None) or getattr(text, "add_cross_attention", False):
        yield "layers attend to the image directly (cross-attention); K and V of the image would have to be shipped"
    if getattr(config, "image_token_id", None) is None:
        yield "its configuration names no visual token, so nothing says which tokens of a prompt are an image's"


def _of_attention(config: PretrainedConfig, text: PretrainedConfig) -> Iterator[str]:
    for cls in _classes(config, text):
        if not cls._supports_attention_backend:
            yield f"transformers' {cls.__name__} has no attention backend to put ours in its place"
    for field in CAPPED_LOGITS:
        if getattr(text, field, None):
            yield f"{field} caps attention logits (softcap), which the statistics and kernels do not compute"
    if getattr(text, "use_bidirectional_attention", False):
        yield "text tokens see those after them (use_bidirectional_attention), so nothing can be generated from a cache"
    if getattr(text, "kv_lora_rank", None):
        yield "its KV is latent (kv_lora_rank), K and V of other widths; the layout would have to know both"
    if getattr(text, "num_kv_shared_layers", 0):
        yield "some of its layers read the KV of others (num_kv_shared_layers), which the pools do not know"
    for rope in _rope_types(text):
        if rope in UNSUPPORTED_ROPE_TYPES:
            yield f"rotary embeddings of type {rope!r} depend on the longest sequence so far"


def _of_layers(text: PretrainedConfig) -> Iterator[str]:
    for kind in getattr(text, "layer_types", None) or ():
        if kind not in (FULL, SLIDING):
            needs = [need for name, need in LAYER_NEEDS.items() if name in kind]
            yield f"it has layers of type {kind!r}; {(needs or ['nothing here knows what they keep'])[0]}"


def _classes(config: PretrainedConfig, text: PretrainedConfig) -> Iterator[type[PreTrainedModel]]:
    """The classes of the whole and of its language model, as far as transformers names them."""
    whole, parts = transformers.AutoModelForImageTextToText._model_mapping, transformers.AutoModel._model_mapping
    for classes, kind in ((whole, type(config)), (parts, type(text))):
        if kind in classes:
            yield classes[kind]


def _rope_types(text: PretrainedConfig) -> list[str | None]:
    """One, or one per type of layer."""
    parameters = getattr(text, "rope_parameters", None) or {}
    kinds = [each for each in parameters.values() if isinstance(each, dict)] or [parameters]
    return [each.get("rope_type") for each in kinds]


def _window(text: PretrainedConfig) -> int:
    """Tokens that a query of a sliding layer sees; 0 where there is none, or where it is switched off."""
    switched_on = getattr(text, "use_sliding_window", True)
    return (getattr(text, "sliding_window", None) or 0) if switched_on else 0
