"""Certificates and a token, made for one stack."""

from __future__ import annotations

import hashlib
import importlib
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vlcache

TENANT = "default"


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """What the processes of a stack, and its clients, show each other."""

    folder: Path
    """Of ca.pem, and NAME.pem and NAME.key for each kind of process."""
    token: str
    """Of the tenant `TENANT`."""

    @classmethod
    def make(cls, folder: Path, hosts: list[str]) -> Credentials:
        """Writes certificates for `hosts` and a file of tokens into `folder`, which is made.

        Raises:
            ValueError: The package that makes certificates is missing.
        """
        authority_module().make_certificates(folder, hosts=hosts)
        token = secrets.token_urlsafe()
        made = cls(folder=folder, token=token)
        made.tokens_file.write_text(f"{TENANT} {hashlib.sha256(token.encode()).hexdigest()}\n")
        return made

    @property
    def tokens_file(self) -> Path:
        """What the router knows of tokens; lines may be added."""
        return self.folder / "tokens.txt"

    @property
    def ca(self) -> Path:
        """What clients trust."""
        return self.folder / "ca.pem"

    @property
    def tls(self) -> vlcache.Tls:
        """Of clients."""
        return vlcache.Tls(ca=self.ca)

    def flags(self, kind: str) -> list[str]:
        """Of a process: router, prefill, decode or combined."""
        certificate = self.folder / kind
        files = ["--tls-cert", f"{certificate}.pem", "--tls-key", f"{certificate}.key", "--tls-ca", str(self.ca)]
        return [*files, "--api-tokens", str(self.tokens_file)] if kind == "router" else files


def authority_module() -> Any:
    """What makes certificates; only a secure stack needs cryptography.

    Raises:
        ValueError: It is missing.
    """
    try:
        return importlib.import_module("vlcache.certs.authority")
    except ImportError as error:
        raise ValueError(f"--secure needs cryptography: pip install 'vlcache[certs]' ({error})") from error
