"""A whole answer, put together from its events and timed as they are read."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlcache._display import to_html, to_markdown
from vlcache._drawing import picture_module
from vlcache._events import (
    Compressed,
    Delta,
    Event,
    Finished,
    FinishReason,
    Logprobs,
    Placement,
    Started,
    Transferred,
    Usage,
)
from vlcache._messages import Image, ImageSource
from vlcache._summary import kv_texts, latencies_text, tokens_text


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds measured by the client. A token arrives when the `Delta` that carries its id is read.

    Of the first answer, where there are several.

    ttft_s: sending → first token, failed attempts and backoff included; None without tokens.
    ttst_s: sending → second token, which shows what the hand-off costs; None with fewer than two tokens.
    itl_s: gaps between tokens, one fewer than tokens; 0 between tokens of the same `Delta`.
    e2e_s: sending → last token, or → the end without tokens.
    """

    ttft_s: float | None
    ttst_s: float | None
    itl_s: tuple[float, ...]
    e2e_s: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of the answers to a request.

    text, token_ids: the answer, and the tokens that were generated for it.
    finish_reason: why it ended.
    logprobs: one entry per token, where `Sampling.logprobs` asked for them; else empty.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[Logprobs, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished answer, or several: `Sampling.n`. `str()` of it is the text of the first; a notebook shows all of them
    with what was kept and how long it took.

    request_id, model: which request, answered by which model.
    text, token_ids: the first answer, and the tokens that were generated for it.
    finish_reason: why it ended.
    usage: tokens of prompt and answers.
    compression: what was kept of the prompt's KV; None when the service did not say.
    transfer: how the KV travelled; None when it did not have to.
    timings: what the client measured.
    seed: draws the same answer again.
    placement: workers that served it.
    logprobs: one entry per token, where `Sampling.logprobs` asked for them; else empty.
    choices: all answers, the first one included.
    """

    request_id: str
    model: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    compression: Compressed | None
    transfer: Transferred | None
    timings: Timings
    seed: int
    placement: Placement
    logprobs: tuple[Logprobs, ...] = ()
    choices: tuple[Choice, ...] = ()

    def __str__(self) -> str:
        return self.text

    def summary(self) -> str:
        """Tokens, KV bytes and latencies in one line."""
        return " | ".join(self._facts())

    def explain(self, images: Sequence[ImageSource] = (), question: str = "") -> Any:
        """The picture of what was kept for it: a `PIL.Image.Image`, which a notebook shows.

        images: those that were asked about, in their order.
        question: what was asked, to be written above them.

        Raises ValueError unless the request said `Compression(explain=True)`, when nothing was dropped yet, or without
        Pillow; OSError when an image cannot be read.
        """
        return picture_module().draw(question, self, [Image(source).read() for source in images])

    def _facts(self) -> list[str]:
        timings = self.timings
        latencies = latencies_text(timings.ttft_s, timings.ttst_s, timings.itl_s)
        return [tokens_text(self.usage), *kv_texts(self.compression, self.transfer), latencies]

    def _repr_html_(self) -> str:
        return to_html(self._texts(), self._facts(), self._kept_share())

    def _repr_markdown_(self) -> str:
        return to_markdown(self._texts(), self._facts(), self._kept_share())

    def _texts(self) -> list[str]:
        return [choice.text for choice in self.choices] or [self.text]

    def _kept_share(self) -> float | None:
        return None if self.compression is None else self.compression.realised_retention


class _Gathered:
    """The pieces of one answer."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.finish_reason = FinishReason.UNSPECIFIED

    def add(self, piece: Delta) -> None:
        self.texts.append(piece.text)
        self.token_ids.extend(piece.token_ids)
        self.logprobs.extend(piece.logprobs)
        self.finish_reason = piece.finish_reason or self.finish_reason

    def choice(self) -> Choice:
        return Choice(
            text="".join(self.texts),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            logprobs=tuple(self.logprobs),
        )


class Collector:
    """Gathers the events of one request. Times are seconds since it was sent."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._model = ""
        self._answers: dict[int, _Gathered] = {0: _Gathered()}
        self._arrivals_s: list[float] = []
        self._compression: Compressed | None = None
        self._transfer: Transferred | None = None
        self._finished: Finished | None = None
        self._end_s = 0.0

    @property
    def has_token(self) -> bool:
        """Whether the first token has arrived."""
        return bool(self._arrivals_s)

    def add(self, event: Event, at_s: float) -> None:
        """Takes an event in that was read `at_s` seconds after sending."""
        match event:
            case Started():
                self._model = event.model
            case Delta():
                self._answers.setdefault(event.choice, _Gathered()).add(event)
                if event.choice == 0:
                    self._arrivals_s.extend([at_s] * len(event.token_ids))
            case Compressed():
                self._compression = event
            case Transferred():
                self._transfer = event
            case Finished():
                self._finished = event
                self._end_s = at_s

    def completion(self) -> Completion | None:
        """The whole answer; None as long as `Finished` is missing."""
        if self._finished is None:
            return None
        choices = tuple(self._answers[number].choice() for number in sorted(self._answers))
        first = choices[0]
        return Completion(
            request_id=self._request_id,
            model=self._model,
            text=first.text,
            token_ids=first.token_ids,
            finish_reason=first.finish_reason,
            usage=self._finished.usage,
            compression=self._compression,
            transfer=self._transfer,
            timings=self._timings(),
            seed=self._finished.seed,
            placement=self._finished.placement,
            logprobs=first.logprobs,
            choices=choices,
        )

    def _timings(self) -> Timings:
        arrivals_s = self._arrivals_s
        return Timings(
            ttft_s=arrivals_s[0] if arrivals_s else None,
            ttst_s=arrivals_s[1] if len(arrivals_s) > 1 else None,
            itl_s=tuple(later - earlier for earlier, later in itertools.pairwise(arrivals_s)),
            e2e_s=arrivals_s[-1] if arrivals_s else self._end_s,
        )
