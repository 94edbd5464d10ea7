"""What a load asks: generated questions about generated images, or those of a file."""

import dataclasses
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlcache._messages import Image
from vlcache._request import Request
from vlcache._settings import Sampling
from vlcache.bench.png import random_png

_WORDS = (
    *("what", "which", "where", "how", "many", "is", "are", "the", "a", "of", "in", "on", "left", "right", "above"),
    *("below", "red", "green", "blue", "yellow", "black", "white", "round", "square", "plate", "sign", "shape"),
    *("colour", "number", "letter", "picture", "image", "object", "person", "street", "house", "tree", "sky", "water"),
    *("read", "say", "count", "list", "describe", "between", "next", "two", "three", "first", "last", "large", "small"),
)
_KEYS = {"prompt", "images", "max_new_tokens"}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """How requests are made; the same seed makes the same ones.

    input_words: words of a generated question; how many tokens they are, the service tells.
    images: files that every question is about.
    image_size: width and height in pixels of generated images, which differ from request to request.
    num_images: generated images of a request, where there are no files.
    prompts: instead of all that, a file of JSON lines `{"prompt": ..., "images": [FILE, ...], "max_new_tokens": N}`.
        Only `prompt` must be there, images are found beside the file, and it begins anew when it is too short.
    base: what requests have in common: model, sampling, compression, priority.
    seed: of words and images.

    Raises ValueError when a value is out of its range.
    """

    input_words: int
    images: tuple[str, ...]
    image_size: tuple[int, int]
    num_images: int
    prompts: str | None
    base: Request
    seed: int

    def __post_init__(self) -> None:
        if self.input_words < 1:
            raise ValueError(f"--random-input-len must be at least 1, got {self.input_words}")
        if self.num_images < 0:
            raise ValueError(f"--images-per-prompt must not be negative, got {self.num_images}")

    def requests(self, count: int) -> list[Request]:
        """So many requests. Raises OSError when a file cannot be read, ValueError when a line has another form."""
        made = self._generated() if self.prompts is None else self._written(Path(self.prompts))
        return list(itertools.islice(made, count))

    def _generated(self) -> Iterator[Request]:
        dice = random.Random(self.seed)  # noqa: S311 - questions are no secrets
        files = [Image(file).read() for file in self.images]
        while True:
            question = " ".join(dice.choices(_WORDS, k=self.input_words))
            images = files or [random_png(*self.image_size, dice) for _ in range(self.num_images)]
            yield dataclasses.replace(self.base, prompt=question, images=images)

    def _written(self, file: Path) -> Iterator[Request]:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{file} holds no prompts")
        return itertools.cycle([self._line(line, f"{file}, prompt {at}") for at, line in enumerate(lines, start=1)])

    def _line(self, line: str, where: str) -> Request:
        entry = _checked(line, where)
        assert self.prompts is not None
        images = [Image(Path(self.prompts).parent / name).read() for name in entry.get("images", ())]
        request = dataclasses.replace(self.base, prompt=entry["prompt"], images=images)
        if "max_new_tokens" not in entry:
            return request
        sampling = dataclasses.replace(self.base.sampling or Sampling(), max_new_tokens=entry["max_new_tokens"])
        return dataclasses.replace(request, sampling=sampling)


def _checked(line: str, where: str) -> Mapping[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: this is no JSON: {error}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError(f"{where}: expected an object with a prompt")
    if unknown := sorted(set(entry) - _KEYS):
        raise ValueError(f"{where} has {', '.join(unknown)}, which is not supported")
    return entry
