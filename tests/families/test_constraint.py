"""Every family's tokenizer, and one with spaces as sentencepiece has them, spells answers of a given form."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from shared.model.grammar import Grammar, Tokens
from shared.model.loading import load_spec, load_tokenizer
from shared.request.constraint import Constraint
from tests.families.loaded import Loaded

SCHEMA = {
    "type": "object",
    "properties": {
        "word": {"enum": ["red plate", "blue", "été"]},
        "codes": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["word", "codes"],
    "additionalProperties": False,
}
WALKS = 20


def check(tokenizer: Any, vocabulary: int, eos: int) -> None:
    """Answers of which every token is drawn from a mask by chance."""
    tokens = Tokens.of(tokenizer, vocabulary=vocabulary, eos_token_ids=[eos]).load()
    grammar = Grammar.compile(Constraint("json_schema", json.dumps(SCHEMA)), tokens)
    for seed in range(WALKS):
        chance, matcher, answer = random.Random(seed), grammar.matcher(), list[int]()
        while not matcher.ended:
            allowed = matcher.allowed(vocabulary)
            assert len(allowed) == vocabulary
            answer.append(chance.choice(allowed.nonzero()[0].tolist()))
            matcher.push(answer[-1])
        special = set(tokenizer.all_special_ids) - {eos}
        assert not special & set(answer)
        jsonschema.validate(json.loads(tokenizer.decode(answer, skip_special_tokens=True)), SCHEMA)


def test_a_family_answers_in_json(loaded: Loaded) -> None:
    spec = load_spec(loaded.folder, torch.float32)
    (eos, *_) = spec.eos_token_ids
    tokenizer = load_tokenizer(loaded.folder)
    check(tokenizer, spec.vocabulary, eos)
    # padded, as most published checkpoints are
    check(tokenizer, spec.vocabulary + 77, eos)


def test_sentencepiece_answers_in_json() -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *'abcdelprtu{}[]:,"0123456789-']
    vocabulary = {piece: token for token, piece in enumerate([*pieces, "▁p", '":', "▁[", "re"])}
    merges = [("▁", "p"), ('"', ":"), ("▁", "["), ("r", "e")]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    check(tokenizer, len(vocabulary) + 5, vocabulary["</s>"])
