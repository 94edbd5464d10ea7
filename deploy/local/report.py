"""What the demonstration prints and sums up. Times are measured by the client, bytes are the service's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from vlcache import Completion
from vlcache.formatting import format_bytes, format_ms, format_share

INDENT = " " * 8


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One bundled question."""

    images: tuple[str, ...]
    """File names in the samples' folder."""
    question: str
    answer: str
    task: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """A question and what came back. Seconds, bytes, and None for what did not happen."""

    question: str
    expected: str
    answer: str
    right: bool
    prompt_tokens: int
    visual_tokens: int
    generated_tokens: int
    kv_full_bytes: int
    kv_kept_bytes: int
    kv_sent_bytes: int
    """Bytes that travelled; 0 inside one process, and when the first token was the whole answer."""
    retention: float
    policy: str
    transport: str
    ttft_s: float | None
    ttst_s: float | None
    itl_s: float | None
    """Mean gap between tokens."""
    prefill_worker: str
    decode_worker: str

    @classmethod
    def of(cls, sample: Sample, completion: Completion) -> Result:
        """Joins a sample and its completion; only the exact answer is right."""
        kept, sent, timings = completion.compression, completion.transfer, completion.timings
        return cls(
            question=sample.question,
            expected=sample.answer,
            answer=completion.text.strip(),
            right=completion.text.strip() == sample.answer.strip(),
            prompt_tokens=completion.usage.prompt_tokens,
            visual_tokens=completion.usage.visual_tokens,
            generated_tokens=completion.usage.generated_tokens,
            kv_full_bytes=kept.full_bytes if kept else 0,
            kv_kept_bytes=kept.kept_bytes if kept else 0,
            kv_sent_bytes=sent.sent_bytes if sent else 0,
            retention=kept.realised_retention if kept else 1.0,
            policy=kept.policy if kept else "",
            transport=sent.transport if sent else "",
            ttft_s=timings.ttft_s,
            ttst_s=timings.ttst_s,
            itl_s=fmean(timings.itl_s) if timings.itl_s else None,
            prefill_worker=completion.placement.prefill_worker,
            decode_worker=completion.placement.decode_worker,
        )

    def lines(self) -> Sequence[str]:
        """What is printed below the streamed answer."""
        text_tokens = self.prompt_tokens - self.visual_tokens
        rows = (
            ("expected", f"{self.expected}  [{'right' if self.right else 'WRONG'}]"),
            ("prompt", f"{self.prompt_tokens} tokens ({self.visual_tokens} visual + {text_tokens} text)"),
            ("KV", self._kv()),
            ("time", f"TTFT {format_ms(self.ttft_s)}, TTST {format_ms(self.ttst_s)}, mean ITL {format_ms(self.itl_s)}"),
        )
        return [f"{INDENT}{name:<8} {text}" for name, text in rows]

    def _kv(self) -> str:
        sent = f"{format_bytes(self.kv_sent_bytes)} sent via {self.transport}" if self.transport else "nothing sent"
        share = format_share(self.retention, 1)
        kept = f"{format_bytes(self.kv_full_bytes)} full, {format_bytes(self.kv_kept_bytes)} kept"
        return f"{kept} ({share} by {self.policy}), {sent}"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All results together; means over the requests that have the figure."""

    questions: int
    answered: int
    right: int
    kv_full_bytes: int
    """Of the prompts whose KV went to a decode worker."""
    kv_kept_bytes: int
    """As `kv_full_bytes`."""
    kv_sent_bytes: int
    saved_factor: float | None
    """Full over sent bytes; None when nothing was sent."""
    ttft_s: float | None
    ttst_s: float | None
    itl_s: float | None

    @classmethod
    def of(cls, results: Sequence[Result], *, questions: int) -> Summary:
        """Sums up; `questions` counts the failed ones too."""
        moved = [result for result in results if result.transport]
        full = sum(result.kv_full_bytes for result in moved)
        sent = sum(result.kv_sent_bytes for result in moved)
        return cls(
            questions=questions,
            answered=len(results),
            right=sum(result.right for result in results),
            kv_full_bytes=full,
            kv_kept_bytes=sum(result.kv_kept_bytes for result in moved),
            kv_sent_bytes=sent,
            saved_factor=full / sent if sent else None,
            ttft_s=_mean(result.ttft_s for result in results),
            ttst_s=_mean(result.ttst_s for result in results),
            itl_s=_mean(result.itl_s for result in results),
        )

    def line(self) -> str:
        """The summary for a reader."""
        factor = f", {self.saved_factor:.1f} times less" if self.saved_factor else ""
        return (
            f"{self.right} of {self.questions} right | "
            f"KV {format_bytes(self.kv_full_bytes)} full, {format_bytes(self.kv_kept_bytes)} kept, "
            f"{format_bytes(self.kv_sent_bytes)} sent{factor} | "
            f"mean TTFT {format_ms(self.ttft_s)}, TTST {format_ms(self.ttst_s)}, ITL {format_ms(self.itl_s)}"
        )


def to_document(results: Sequence[Result], summary: Summary) -> dict[str, Any]:
    """The demonstration as one JSON object; keys carry their units."""
    return {"summary": asdict(summary), "questions": [asdict(result) for result in results]}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
