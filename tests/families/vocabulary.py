"""A tokenizer made in code: byte-level BPE, trained on a few words, with the special tokens of a family."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MERGES = 64
CORPUS = (
    "What is in the image? Compare the two images.",
    "You are a helpful assistant. Answer in one word: yes or no.",
)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Special tokens; the vocabulary is these, all bytes and what training merges.

    Attributes:
        named: By the names under which processors ask the tokenizer for them, `image_token` for instance.
        others: Tokens of the chat template and of tiles.
    """

    bos: str | None
    eos: str
    pad: str
    named: dict[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    @property
    def special(self) -> list[str]:
        """Every special token once."""
        named = [token for token in (self.bos, self.eos, self.pad) if token is not None]
        return list(dict.fromkeys([*named, *self.named.values(), *self.others]))


def build_tokenizer(vocabulary: Vocabulary) -> PreTrainedTokenizerFast:
    """Any UTF-8 text round-trips; neither start nor end is added to it: chat templates write them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(vocabulary.special) + len(alphabet) + MERGES,
        show_progress=False,
        special_tokens=vocabulary.special,
        initial_alphabet=alphabet,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=vocabulary.bos,
        eos_token=vocabulary.eos,
        pad_token=vocabulary.pad,
        additional_special_tokens=list(vocabulary.others),
        extra_special_tokens=vocabulary.named,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
