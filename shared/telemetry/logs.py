"""Logging to stderr, a line per event, as text or as JSON. Lines about a request carry its id and that of its trace."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any, Literal

from shared.telemetry.scope import current

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
LogFormat = Literal["text", "json"]

# Libraries log at DEBUG what they were given: tags of images, prompts. So only our own code does.
OWN = ("router", "prefill_worker", "decode_worker", "shared", "deploy")
# What `extra` of a line may have; its values are those of JSON.
DETAILS = "details"


def configure_logging(name: str, level: LogLevel = "INFO", log_format: LogFormat = "text") -> None:
    """Sends the log of this process to stderr, each line naming the process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(name) if log_format == "json" else TextFormatter(name))
    logging.basicConfig(level="INFO" if level == "DEBUG" else level, handlers=[handler], force=True)
    for own in OWN:
        logging.getLogger(own).setLevel(level)


class TextFormatter(logging.Formatter):
    """For people: the ids stand at the end of a line, before an exception."""

    def __init__(self, name: str) -> None:
        super().__init__(f"%(asctime)s {name} %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging calls it
        """The line without its exception."""
        return " ".join([super().formatMessage(record), *(f"{key}={value}" for key, value in _ids().items())])


class JsonFormatter(logging.Formatter):
    """For machines. The keys stay: time, level, service, logger, message; request_id, trace_id, details and exception
    where there is one."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def format(self, record: logging.LogRecord) -> str:
        """The whole line."""
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "service": self._name,
            "logger": record.name,
            "message": record.getMessage(),
            **_ids(),
        }
        if (details := getattr(record, DETAILS, None)) is not None:
            line["details"] = details
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _ids() -> dict[str, str]:
    scope = current()
    ids = {"request_id": scope.request_id, "trace_id": scope.span.trace_id}
    return {key: value for key, value in ids.items() if value}
