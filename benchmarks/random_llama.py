"""Language models with random weights in a Llama shape: a step costs what it would cost with trained ones."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import tyro
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from benchmarks.shapes import SHAPES, ShapeName, TextShape
from shared.kv.layout import KVLayout
from shared.model.attention import DECODE_ATTENTION
from shared.model.loading import DTYPES
from shared.model.spec import DTYPE_NAMES

HEAD_DIM = 128


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model and where it runs; every benchmark with random weights has these settings."""

    device: Literal["cpu", "cuda"] = "cpu"
    """On `cuda` the KV lies in blocks and steps are CUDA graphs, as in the decode worker."""
    shape: ShapeName | None = None
    """Sizes of a known language model, in place of `layers`, `hidden`, `kv_heads` and `vocabulary`."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of weights and KV."""
    kv_heads: int = 8
    """KV heads."""
    layers: int = 8
    """Layers."""
    hidden: int = 1024
    """Hidden size; one query head per 128."""
    vocabulary: int = 32000
    """Vocabulary size."""
    block_size: int = 16
    """Tokens in a block of KV on a GPU."""
    threads: int = 1
    """torch threads."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE|-")] = None
    """Where to write the figures; `-` prints them as the last line."""

    @property
    def text(self) -> TextShape:
        """The sizes."""
        if self.shape is not None:
            return SHAPES[self.shape]
        return TextShape(
            hidden=self.hidden,
            intermediate=self.hidden * 11 // 4,
            layers=self.layers,
            query_heads=self.hidden // HEAD_DIM,
            kv_heads=self.kv_heads,
            head_dim=HEAD_DIM,
            vocabulary=self.vocabulary,
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def on_gpu(self) -> bool:
        """Whether engine, KV storage and baselines are those of a GPU."""
        return self.device == "cuda"

    @property
    def workload(self) -> dict[str, Any]:
        """What was measured, for the report; the sizes are those of the shape."""
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name != "json"}
        return {**settings, **dataclasses.asdict(self.text)}

    @property
    def layout(self) -> KVLayout:
        """Of the KV."""
        text = self.text
        return KVLayout(
            num_layers=text.layers,
            num_kv_heads=text.kv_heads,
            head_dim=text.head_dim,
            dtype=DTYPE_NAMES[self.torch_dtype],
        )


def build_model(config: ModelConfig, *, positions: int) -> PreTrainedModel:
    """A model for our decode attention with unpacked layers, made where it runs: 7B never pass through the host.

    Args:
        config: Which.
        positions: Tokens of its context.
    """
    text = config.text
    llama = LlamaConfig(
        hidden_size=text.hidden,
        intermediate_size=text.intermediate,
        num_hidden_layers=text.layers,
        num_attention_heads=text.query_heads,
        num_key_value_heads=text.kv_heads,
        head_dim=text.head_dim,
        vocab_size=text.vocabulary,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        # random tokens must not end an answer
        eos_token_id=None,
    )
    with torch.device(config.torch_device):
        model = LlamaForCausalLM._from_config(llama, dtype=config.torch_dtype, attn_implementation=DECODE_ATTENTION)
    return model.eval()


def twin(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """The same weights, not copied, under another attention: models that share a configuration share its attention."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)
    other.set_attn_implementation(attention)
    return other


def baseline_attention(config: ModelConfig) -> str:
    """The fastest one that transformers has here; SDPA takes PyTorch's own flash kernels where it can."""
    return "flash_attention_2" if config.on_gpu and is_flash_attn_2_available() else "sdpa"


def weight_bytes(model: PreTrainedModel) -> int:
    """What a step reads: the input embedding is looked up, not read."""
    return sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if "embed_tokens" not in name
    )


def device_facts(config: ModelConfig) -> dict[str, Any]:
    """The accelerator, if any; everything else stands in the report's environment."""
    if config.device == "cpu":
        return {"device": "cpu"}
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None
    return {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": triton}
