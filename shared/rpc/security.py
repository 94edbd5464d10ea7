"""What every service is told about its identity, and about who may read along."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from shared.flags import SECURITY
from shared.rpc.identity import Identity, TlsFiles


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Who a process is."""

    roles: ClassVar[tuple[str, ...]] = ()
    """What its certificate must name."""

    tls_cert: Annotated[Path | None, SECURITY] = None
    """PEM file of this process's certificate, which names its hosts and, as spiffe://vlcache/ROLE, its roles; with
    --tls-key and --tls-ca all services speak TLS with each other. Replaced files are used without a restart."""
    tls_key: Annotated[Path | None, SECURITY] = None
    """PEM file of its private key."""
    tls_ca: Annotated[Path | None, SECURITY] = None
    """PEM file of the CA that signs the certificates of all services."""

    def __post_init__(self) -> None:
        given = [flag is not None for flag in (self.tls_cert, self.tls_key, self.tls_ca)]
        if any(given) and not all(given):
            raise ValueError("--tls-cert, --tls-key and --tls-ca belong together: give all three or none")
        # a file that cannot be used is known before a model is loaded
        self.identity()

    def identity(self) -> Identity | None:
        """Who this process is; None where it speaks plaintext.

        Raises:
            ValueError: A file cannot be used. Says why.
        """
        if self.tls_cert is None or self.tls_key is None or self.tls_ca is None:
            return None
        return Identity(TlsFiles(cert=self.tls_cert, key=self.tls_key, ca=self.tls_ca), self.roles)


@dataclass(frozen=True, kw_only=True)
class Security(Tls):
    """Part of the configuration of every service."""

    allow_plaintext: Annotated[bool, SECURITY] = False
    """Listen without TLS on other addresses than loopback, where others may read along and call."""

    def check_host(self, host: str) -> None:
        """Checks that nobody listens in plaintext where others are.

        Raises:
            ValueError: Says what to do.
        """
        if self.tls_cert is None and not self.allow_plaintext and not is_loopback(host):
            raise ValueError(
                f"without TLS everybody who reaches {host} could read along and call: give --tls-cert, --tls-key and "
                "--tls-ca, listen on 127.0.0.1, or allow it with --allow-plaintext"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
