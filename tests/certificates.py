"""Certificates for tests: right ones, and wrong ones in every way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import grpc
from vlcache.certs.authority import Authority

from shared.rpc.identity import Identity, TlsFiles, channel_credentials

HOSTS = ("127.0.0.1", "localhost")


class Certificates:
    """A CA and what it signs, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._authority = Authority.open(folder)

    @property
    def ca(self) -> Path:
        return self._folder / "ca.pem"

    def files(
        self,
        name: str,
        roles: Iterable[str] | None = None,
        *,
        hosts: Sequence[str] = HOSTS,
        days: float = 1,
        ca: Path | None = None,
    ) -> TlsFiles:
        """A new certificate; of the role that is its name unless `roles` says otherwise."""
        key, cert = self._authority.issue(name, [name] if roles is None else roles, hosts=hosts, days=days)
        return TlsFiles(cert=cert, key=key, ca=ca or self.ca)

    def identity(self, name: str, **options: object) -> Identity:
        """The same, read; nothing is demanded of its roles."""
        return Identity(self.files(name, **options), ())

    def channel(self, name: str, **options: object) -> grpc.ChannelCredentials:
        """The same, for a channel; it is not proven before, so that it may be wrong."""
        files = self.files(name, **options)
        return grpc.ssl_channel_credentials(files.ca.read_bytes(), files.key.read_bytes(), files.cert.read_bytes())


def flags(files: TlsFiles) -> list[str]:
    """Of a service."""
    return ["--tls-cert", str(files.cert), "--tls-key", str(files.key), "--tls-ca", str(files.ca)]


def settings(files: TlsFiles) -> dict[str, Path]:
    """The same, for its configuration."""
    return {"tls_cert": files.cert, "tls_key": files.key, "tls_ca": files.ca}


def credentials(identity: Identity) -> grpc.ChannelCredentials:
    return channel_credentials(identity.current())
