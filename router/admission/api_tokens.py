"""The tokens that clients show: a file of tenants and hashes."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from pathlib import Path

from router.admission.tenants import NAME
from shared.reloaded import Reloaded

DIGEST = re.compile(r"[0-9a-fA-F]{64}")
MAX_FILE_BYTES = 16 << 20


class ApiTokens:
    """The tokens of a file, as it is now.

    A token is random and long, so that its plain SHA-256 says nothing about it.
    """

    def __init__(self, file: Path) -> None:
        """Reads the file.

        Raises:
            ValueError: See `read_tokens`.
        """
        self._tenants = Reloaded([file], lambda: read_tokens(file))

    def tenant_of(self, token: str) -> str | None:
        """Whose token it is; None for nobody's. How long that takes does not depend on how much of it is right."""
        shown = hashlib.sha256(token.encode()).digest()
        found = None
        for digest, tenant in self._tenants.current().items():
            if hmac.compare_digest(digest, shown):
                found = tenant
        return found


def read_tokens(file: Path) -> Mapping[bytes, str]:
    """Tenants by the SHA-256 of their tokens. Empty lines, and what follows a #, are comments.

    Raises:
        ValueError: The file cannot be read, or a line is no tenant with a hash. Names file and line, and no hash.
    """
    try:
        with file.open(encoding="utf-8") as lines:
            text = lines.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"the tokens {file} cannot be read: {error.strerror}") from error
    if len(text) > MAX_FILE_BYTES:
        raise ValueError(f"the tokens {file} are larger than {MAX_FILE_BYTES >> 20} MiB")
    tenants: dict[bytes, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not NAME.fullmatch(words[0]) or not DIGEST.fullmatch(words[1]):
            raise ValueError(f"line {number} of the tokens {file} is not a tenant and a SHA-256 in hexadecimal")
        digest = bytes.fromhex(words[1])
        if tenants.setdefault(digest, words[0]) != words[0]:
            raise ValueError(f"line {number} of the tokens {file} gives a token to a second tenant")
    return tenants
