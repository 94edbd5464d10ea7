"""Who can work with whom."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from router.placement.base import Group
from router.workers.worker import PREFILL, READY, Worker


def groups_by_model(workers: Iterable[Worker]) -> Mapping[str, Sequence[Group]]:
    """By model, groups that have both roles; their sizes add up to those of the fleet, their pairs are never listed."""
    members: dict[tuple[str, str, int], tuple[list[Worker], list[Worker]]] = defaultdict(lambda: ([], []))
    for worker in workers:
        if worker.state == READY:
            prefill, decode = members[worker.key]
            (prefill if worker.info.role == PREFILL else decode).append(worker)
    groups: dict[str, list[Group]] = defaultdict(list)
    for (model, *_), (prefill, decode) in members.items():
        if prefill and decode:
            groups[model].append(Group(prefill, decode))
    return groups
