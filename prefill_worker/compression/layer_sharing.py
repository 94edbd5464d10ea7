"""Which layers of a checkpoint may share KV: a file beside its weights, made by `python -m prefill_worker.calibrate`.

It belongs to these weights, in whatever precision they are loaded.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from shared.model.loading import checkpoint_hash

log = logging.getLogger(__name__)

FILE_NAME = "kv_sharing.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SharedPair:
    """A layer that may read another one's KV.

    Attributes:
        borrower: The upper one, which then has no KV of its own.
        lender: The lower one.
        distance: Euclidean, between the mean KV of both.
        cosine: Of the last hidden states with the undisturbed model's, mean over tokens of text, then over
            prompts, when this pair and all before it share.
    """

    borrower: int
    lender: int
    distance: float
    cosine: float


@dataclass(frozen=True, kw_only=True)
class LayerSharing:
    """Pairs in the order in which they were found; any number of the first ones was tried together.

    Attributes:
        checkpoint: The `checkpoint_hash` of the weights.
        threshold: What the cosine of each pair exceeds.
        prompts: What it was found with, in words.
    """

    checkpoint: str
    threshold: float
    prompts: str
    pairs: tuple[SharedPair, ...]

    def __post_init__(self) -> None:
        borrowers, lenders = {pair.borrower for pair in self.pairs}, {pair.lender for pair in self.pairs}
        if not self.pairs or len(borrowers) < len(self.pairs) or borrowers & lenders:
            raise ValueError("a layer borrows once, and one that borrows does not lend")
        if not all(0 <= pair.lender < pair.borrower for pair in self.pairs):
            raise ValueError("a lender lies below its borrower")

    @classmethod
    def load(cls, path: Path, num_layers: int) -> LayerSharing | None:
        """What the file beside a checkpoint says; None where there is none for these weights, or none to be read."""
        file = path / FILE_NAME
        if not file.exists():
            return None
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            pairs = tuple(SharedPair(**pair) for pair in values.pop("pairs"))
            if values.pop("format") != FORMAT:
                raise ValueError("another format")
            if max(pair.borrower for pair in pairs) >= num_layers:
                raise ValueError("a layer that the model does not have")
            sharing = cls(pairs=pairs, **values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s is not used: %s", file, error)
            return None
        return sharing if sharing.checkpoint == checkpoint_hash(path) else None

    def save(self, path: Path) -> None:
        """Writes it beside a checkpoint."""
        values = {"format": FORMAT, **asdict(self)}
        (path / FILE_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
