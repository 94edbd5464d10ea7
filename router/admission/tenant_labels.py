"""Names of tenants as values of a metric's label."""

from __future__ import annotations

from router.admission.tenants import DEFAULT_TENANT

MAX_LABELS = 32
OTHER = "other"


class TenantLabels:
    """The first names to come are values of their own, the others one together: names cost memory where scrapes go."""

    def __init__(self) -> None:
        self._names = {DEFAULT_TENANT}

    def of(self, tenant: str) -> str:
        """The value that stands for `tenant`."""
        if tenant not in self._names and len(self._names) < MAX_LABELS:
            self._names.add(tenant)
        return tenant if tenant in self._names else OTHER
