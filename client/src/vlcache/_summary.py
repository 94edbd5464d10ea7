"""Tokens, KV bytes and latencies of an answer in words."""

from collections.abc import Iterator, Sequence

from vlcache._events import Compressed, Guard, Transferred, Usage
from vlcache.formatting import format_bytes, format_ms, format_share


def tokens_text(usage: Usage) -> str:
    """How long prompt and answer were."""
    prompt = f"prompt {usage.prompt_tokens} tokens ({usage.visual_tokens} visual + {usage.text_tokens} text)"
    return f"{prompt} | answer {usage.generated_tokens} tokens"


def kv_texts(compression: Compressed | None, transfer: Transferred | None) -> Iterator[str]:
    """What was kept of the KV and what was sent, as far as it is known."""
    if compression is not None:
        yield (
            f"KV {format_bytes(compression.full_bytes)} full, {format_bytes(compression.kept_bytes)} kept "
            f"({format_share(compression.realised_retention, 1)} by {compression.policy}{_changed(compression)})"
        )
    if transfer is not None:
        yield f"{format_bytes(transfer.sent_bytes)} sent via {transfer.transport}"


def _changed(compression: Compressed) -> str:
    if compression.guard is Guard.REFUSED:
        return ", no room for what the guard wants"
    if compression.requested_retention == compression.asked_retention:
        return ""
    return f", {format_share(compression.asked_retention, 1)} asked"


def latencies_text(ttft_s: float | None, ttst_s: float | None, itl_s: Sequence[float]) -> str:
    """First token, second token, mean gap."""
    mean_itl_s = sum(itl_s) / len(itl_s) if itl_s else None
    return f"TTFT {format_ms(ttft_s)}, TTST {format_ms(ttst_s)}, mean ITL {format_ms(mean_itl_s)}"
