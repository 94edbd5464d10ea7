"""Whose requests a client sends: one entry of every call's metadata."""

import re

METADATA_KEY = "vlcache-tenant"
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")


def tenant_metadata(tenant: str | None) -> tuple[tuple[str, str], ...]:
    """Metadata of a request of `tenant`; empty for None. Raises ValueError when that is no tenant's name."""
    if tenant is None:
        return ()
    if not _TENANT.fullmatch(tenant):
        raise ValueError(f"tenant must be 1 to 64 of [A-Za-z0-9._-], got {tenant!r}")
    return ((METADATA_KEY, tenant),)
