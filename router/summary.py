"""What there is to say of a request when it has ended: a line of the access log, and the attributes of its span."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass

from shared.telemetry.logs import DETAILS
from shared.telemetry.span import Value

log = logging.getLogger("router.access")


@dataclass(kw_only=True)
class Summary:
    """Filled in while the request goes on; None or empty is what it has not come to. Nothing of what it says."""

    tenant: str
    outcome: str = ""
    code: str = ""
    reason: str = ""
    model: str = ""
    policy: str = ""
    retention_asked: float | None = None
    retention: float | None = None
    prompt_tokens: int | None = None
    visual_tokens: int | None = None
    generated_tokens: int | None = None
    kv_full_bytes: int | None = None
    kv_kept_bytes: int | None = None
    kv_sent_bytes: int | None = None
    """Of all its transfers."""
    transport: str = ""
    """Of the last one."""
    first_token_s: float | None = None
    total_s: float | None = None
    prefill_worker: str = ""
    decode_worker: str = ""
    """Where it was last."""
    failovers: int = 0

    def known(self) -> dict[str, Value]:
        """Name by name, without what is not known."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}


def write_access_line(summary: Summary) -> None:
    """One line at INFO; in JSON with every value by its name."""
    known = summary.known()
    log.info("%s", " ".join(f"{name}={_text(value)}" for name, value in known.items()), extra={DETAILS: known})


def _text(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
