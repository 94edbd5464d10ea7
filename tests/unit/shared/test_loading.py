"""Checkpoints: the prefill half loads everything, the decode half only the language model, both from the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from shared.kv.layout import KVLayout
from shared.model import loading
from shared.model.attention import DECODE_ATTENTION, PREFILL_ATTENTION
from shared.model.identity import ModelIdentity
from shared.model.loading import (
    compatibility_hash,
    load_decode_model,
    load_prefill_model,
    load_spec,
    load_tokenizer,
    pick_dtype,
)
from shared.model.processor import load_processor
from shared.model.support import UnsupportedModelError
from tests.unit.shared.tiny_llava import HEAD_DIM, KV_HEADS, LAYERS, PlainHook, copied, edit_json, edit_weights

CPU = torch.device("cpu")
LAYOUT = KVLayout(num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="float32")
IDS = torch.tensor([[5, 9, 40, 300, 12, 7]])


def is_vision(name: str) -> bool:
    return "vision_tower" in name or "multi_modal_projector" in name


def test_the_decode_model_has_no_vision_module(tiny_checkpoint: Path) -> None:
    model = load_decode_model(tiny_checkpoint, dtype=torch.float32, device=CPU)
    assert not [name for name, _ in model.named_modules() if is_vision(name)]
    assert not [name for name, _ in model.named_parameters() if is_vision(name)]
    assert not model.training


def test_the_decode_model_reads_no_vision_weight(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bare = copied(tiny_checkpoint, tmp_path)
    edit_weights(bare, lambda weights: {name: w for name, w in weights.items() if not is_vision(name)})
    model = load_decode_model(bare, dtype=torch.float32, device=CPU)
    whole = load_decode_model(tiny_checkpoint, dtype=torch.float32, device=CPU)
    assert model.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(UnsupportedModelError):
        load_prefill_model(bare, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("lost", ["lm_head.weight", "layers.1.self_attn.k_proj.weight", "model.norm.weight"])
def test_a_missing_weight_of_the_language_model_is_refused(tiny_checkpoint: Path, tmp_path: Path, lost: str) -> None:
    bare = copied(tiny_checkpoint, tmp_path)
    edit_weights(bare, lambda weights: {name: w for name, w in weights.items() if not name.endswith(lost)})
    for load in (load_decode_model, load_prefill_model):
        with pytest.raises(UnsupportedModelError, match=lost.removeprefix("model.")):
            load(bare, dtype=torch.float32, device=CPU)


@torch.inference_mode()
def test_both_halves_compute_what_the_plain_model_computes(tiny_checkpoint: Path) -> None:
    plain = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint, attn_implementation="eager").eval()
    expected = plain(input_ids=IDS).logits
    assert expected.std() > 0.1
    for load in (load_prefill_model, load_decode_model):
        hook = PlainHook()
        logits = load(tiny_checkpoint, dtype=torch.float32, device=CPU)(input_ids=IDS, vlc=hook).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        assert len(hook.calls) == LAYERS


@torch.inference_mode()
def test_the_prefill_model_sees_images_and_keeps_the_attention_of_its_vision_tower(tiny_checkpoint: Path) -> None:
    model = load_prefill_model(tiny_checkpoint, dtype=torch.float32, device=CPU)
    assert model.config.text_config._attn_implementation == PREFILL_ATTENTION
    assert model.config.vision_config._attn_implementation not in (PREFILL_ATTENTION, DECODE_ATTENTION)
    processor, logits = load_processor(tiny_checkpoint), []
    for colour in ("black", "white"):
        image = Image.new("RGB", (40, 30), colour)
        inputs = processor(images=[image], text="<image>what is it", return_tensors="pt")
        hook = PlainHook()
        logits.append(model(**inputs, vlc=hook).logits)
        assert [call[0] for call in hook.calls] == list(range(LAYERS)), "the vision tower called the hook"
    assert not torch.allclose(*logits)


def test_the_decode_model_uses_the_decode_attention(tiny_checkpoint: Path) -> None:
    model = load_decode_model(tiny_checkpoint, dtype=torch.float32, device=CPU)
    assert model.config.text_config._attn_implementation == DECODE_ATTENTION


def test_weights_have_the_precision_that_was_asked_for(tiny_checkpoint: Path) -> None:
    model = load_decode_model(tiny_checkpoint, dtype=torch.bfloat16, device=CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert load_spec(tiny_checkpoint, torch.bfloat16).layout.dtype == "bfloat16"


def test_the_tokenizer_alone_is_that_of_the_processor(tiny_checkpoint: Path) -> None:
    text = "What colour is the circle?"
    assert load_tokenizer(tiny_checkpoint).encode(text) == load_processor(tiny_checkpoint).tokenizer.encode(text)


def test_dtypes_by_name() -> None:
    assert pick_dtype("float32", CPU) is torch.float32
    assert pick_dtype("bfloat16", CPU) is torch.bfloat16
    assert pick_dtype("float16", CPU) is torch.float16
    assert pick_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert pick_dtype("auto", CPU) in (torch.float32, torch.bfloat16)


def test_two_copies_of_a_checkpoint_are_compatible(tiny_checkpoint: Path, tmp_path: Path) -> None:
    first = compatibility_hash(tiny_checkpoint, LAYOUT)
    assert first == compatibility_hash(tiny_checkpoint, LAYOUT)
    assert first == compatibility_hash(copied(tiny_checkpoint, tmp_path), LAYOUT)


def test_workers_that_write_parcels_in_another_form_are_not_compatible(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compatibility_hash(tiny_checkpoint, LAYOUT)
    monkeypatch.setattr("shared.model.loading.FORMAT_VERSION", 99)
    assert compatibility_hash(tiny_checkpoint, LAYOUT) != first


def test_other_weights_settings_or_layouts_are_not_compatible(tiny_checkpoint: Path, tmp_path: Path) -> None:
    hashes = {compatibility_hash(tiny_checkpoint, LAYOUT)}
    bf16 = KVLayout(num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="bfloat16")
    hashes.add(compatibility_hash(tiny_checkpoint, bf16))
    changed = copied(tiny_checkpoint, tmp_path)
    edit_weights(changed, lambda weights: {name: w + 1e-3 for name, w in weights.items()})
    hashes.add(compatibility_hash(changed, LAYOUT))
    edit_json(changed / "config.json", lambda fields: fields["text_config"].update(rms_norm_eps=1e-3))
    hashes.add(compatibility_hash(changed, LAYOUT))
    (changed / "model.safetensors").rename(changed / "model-1.safetensors")
    hashes.add(compatibility_hash(changed, LAYOUT))
    assert len(hashes) == 5


@pytest.mark.parametrize("at", [0, -1])
def test_the_ends_of_a_large_weight_file_enter_the_hash(tiny_checkpoint: Path, tmp_path: Path, at: int) -> None:
    changed = copied(tiny_checkpoint, tmp_path)
    file, size = changed / "model.safetensors", 3 * loading.HASHED_BYTES
    raw = bytearray(size)
    file.write_bytes(raw)
    before = compatibility_hash(changed, LAYOUT)
    raw[at] = 1
    file.write_bytes(raw)
    assert compatibility_hash(changed, LAYOUT) != before


def test_the_identity_of_a_checkpoint_is_what_workers_report(tiny_checkpoint: Path) -> None:
    spec = load_spec(tiny_checkpoint, torch.float32)
    identity = ModelIdentity.of("", tiny_checkpoint, spec)
    assert identity.name == "tiny-llava"
    assert ModelIdentity.of("other", tiny_checkpoint, spec).name == "other"
    message = identity.to_proto()
    assert (message.name, message.compatibility) == ("tiny-llava", compatibility_hash(tiny_checkpoint, LAYOUT))
    assert KVLayout.from_proto(message.layout) == LAYOUT
    assert message.context_tokens == 256
