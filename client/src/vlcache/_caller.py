"""Who a client is to the service: the metadata of every call."""

import re

METADATA_KEY = "vlcache-tenant"
TOKEN_KEY = "authorization"  # noqa: S105 - the name of a metadata entry
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TOKEN = re.compile(r"[!-~]+")

Metadata = tuple[tuple[str, str], ...]


def caller_metadata(tenant: str | None, token: str | None) -> Metadata:
    """Metadata of the calls of `tenant`, or of who has `token`.

    Raises ValueError when that is no tenant's name, or the token has other characters than tokens have.
    """
    return (*_tenant_entry(tenant), *_token_entry(token))


def _tenant_entry(tenant: str | None) -> Metadata:
    if tenant is None:
        return ()
    if not _TENANT.fullmatch(tenant):
        raise ValueError(f"tenant must be 1 to 64 of [A-Za-z0-9._-], got {tenant!r}")
    return ((METADATA_KEY, tenant),)


def _token_entry(token: str | None) -> Metadata:
    if token is None:
        return ()
    if not _TOKEN.fullmatch(token):
        # it is a secret: the error must not show it
        raise ValueError("a token has no blanks, and no other characters than ASCII")
    return ((TOKEN_KEY, f"Bearer {token}"),)
