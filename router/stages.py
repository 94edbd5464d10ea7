"""Names of the stages of a request's life, as clients, errors and metrics see them."""

from __future__ import annotations

QUEUE, PREFILL, TRANSFER, DECODE = "queue", "prefill", "transfer", "decode"
