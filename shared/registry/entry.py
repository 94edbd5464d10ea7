"""What a registry holds of one worker, as JSON: readable for operators, and for routers an address."""

from __future__ import annotations

import json
from dataclasses import dataclass

from google.protobuf import json_format
from vlcache.worker.v1 import worker_pb2

from shared.registry.address import split_address

# An entry has about 1 KiB; what is larger was not written by a worker.
MAX_ENTRY_BYTES = 16 * 1024


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One worker, and the `host:port` at which others reach it."""

    address: str
    info: worker_pb2.WorkerInfo

    @property
    def name(self) -> str:
        """Unlike any other entry's: workers may share a name, and the two halves of one process its epoch."""
        return f"{self.info.role}:{self.info.epoch}"

    def to_json(self) -> str:
        """One object: `address`, and what the worker says about itself under the names of `WorkerInfo`."""
        worker = json_format.MessageToDict(
            self.info, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        return json.dumps({"address": self.address, "worker": worker})


def read_address(value: bytes) -> str:
    """The address in an entry. Whoever can write to the registry can write anything, so nothing else is looked at.

    Raises:
        ValueError: There is none.
    """
    if len(value) > MAX_ENTRY_BYTES:
        raise ValueError(f"it is larger than {MAX_ENTRY_BYTES} bytes")
    try:
        entry = json.loads(value)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("address"), str):
        raise ValueError("it is no object with an address")
    split_address(entry["address"])
    return entry["address"]
