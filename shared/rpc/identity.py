"""Who a process is: certificate, key and CA, proven before they are used, and read again when their files change."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from shared.errors import UnavailableError
from shared.registry.address import split_address
from shared.reloaded import Reloaded

ROUTER, PREFILL, DECODE = "router", "prefill", "decode"
ROLE_URI = "spiffe://vlcache/"

# what two ends of one library need to agree: hello, answer, finish
ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """PEM files."""

    cert: Path
    """The certificate, then those between it and the CA, if any."""
    key: Path
    """Its private key, not encrypted."""
    ca: Path
    """Certificates of the CAs that sign those of all services."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What was read, and what it says."""

    cert: bytes
    key: bytes
    ca: bytes
    roles: frozenset[str]
    context: ssl.SSLContext
    """Of a client."""
    server: ssl.SSLContext
    """Of a server that is none of gRPC's."""

    @classmethod
    def read(cls, files: TlsFiles, roles: Iterable[str]) -> Material:
        """Reads and proves the files.

        Raises:
            ValueError: One cannot be read, they do not belong together, the CA has not signed the certificate or it is
                not valid now, or a role is not in it. Says which.
        """
        client, server = _contexts(files)
        named = roles_of(_meet(client, server))
        if missing := sorted(set(roles) - named):
            wanted = " and ".join(f"{ROLE_URI}{role}" for role in missing)
            raise ValueError(f"the certificate {files.cert} is not for this service: it does not name {wanted}")
        cert, key, ca = (_bytes(file) for file in (files.cert, files.key, files.ca))
        return cls(cert=cert, key=key, ca=ca, roles=named, context=client, server=server)


class Identity:
    """Certificate, key and CA of this process. Every handshake uses the files as they are then."""

    def __init__(self, files: TlsFiles, roles: Iterable[str]) -> None:
        """Reads the files.

        Args:
            roles: What the certificate must name.

        Raises:
            ValueError: See `Material.read`.
        """
        roles = tuple(roles)
        files_read = (files.cert, files.key, files.ca)
        self._material = Reloaded(files_read, lambda: Material.read(files, roles))

    def current(self) -> Material:
        """The same object until the files change."""
        return self._material.current()

    def server_credentials(self, *, demand_client_cert: bool) -> grpc.ServerCredentials:
        """For a port. Connections that are open stay; new ones are served by the files as they are.

        Args:
            demand_client_cert: Whether callers need a certificate of the CA; otherwise they are asked for none.
        """
        served = self.current()

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal served
            material = self.current()
            if material is served:
                return None
            served = material
            return _configuration(material)

        return grpc.dynamic_ssl_server_credentials(_configuration(served), changed, demand_client_cert)

    async def roles_at(self, address: str, *, timeout_s: float) -> frozenset[str]:
        """The roles that whoever listens at `address` has a certificate for.

        grpc tells a client nothing of the certificate of its server, so a connection is made to look at it.

        Raises:
            UnavailableError: Nobody listens, or not with a certificate of the CA for this host.
        """
        host, port = split_address(address)
        host = host.strip("[]")
        try:
            opening = asyncio.open_connection(host, port, ssl=self.current().context, server_hostname=host)
            _, writer = await asyncio.wait_for(opening, timeout_s)
        except (OSError, asyncio.TimeoutError) as error:
            raise UnavailableError("the worker's certificate cannot be seen", reason="WORKER_UNREACHABLE") from error
        certificate = writer.get_extra_info("peercert")
        writer.transport.abort()
        return roles_of(certificate)


def channel_credentials(material: Material) -> grpc.ChannelCredentials:
    """For a channel to another service; its certificate must be of the CA and name the host."""
    return grpc.ssl_channel_credentials(material.ca, material.key, material.cert)


def roles_of(certificate: dict[str, Any] | None) -> frozenset[str]:
    """The roles that a certificate names, which is in the form of `ssl.SSLSocket.getpeercert`."""
    names = (certificate or {}).get("subjectAltName", ())
    return roles_in(value for kind, value in names if kind == "URI")


def roles_in(uris: Iterable[str]) -> frozenset[str]:
    """The roles among URIs."""
    return frozenset(uri.removeprefix(ROLE_URI) for uri in uris if uri.startswith(ROLE_URI))


def _configuration(material: Material) -> grpc.ServerCertificateConfiguration:
    pairs = [(material.key, material.cert)]
    return grpc.ssl_server_certificate_configuration(pairs, root_certificates=material.ca)


def _contexts(files: TlsFiles) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    client, server = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.verify_mode = ssl.CERT_REQUIRED
    # what grpc speaks
    client.set_alpn_protocols(["h2"])
    for context in (client, server):
        with _refused(f"the certificates {files.ca} of the CA"):
            context.load_verify_locations(files.ca)
        with _refused(f"the certificate {files.cert} with the key {files.key}"):
            # a password that is wrong for every key: nobody is there to be asked for one
            context.load_cert_chain(files.cert, files.key, password="")
    return client, server


def _meet(client: ssl.SSLContext, server: ssl.SSLContext) -> dict[str, Any] | None:
    """The certificate, as each end of a connection shows it to the other, which checks it against the CA."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    # the host is checked by those who connect to it
    ends = (_without_host(client, back, there), server.wrap_bio(there, back, server_side=True))
    with _refused("the certificate"):
        for end in ends * ROUNDS:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return ends[0].getpeercert()


def _without_host(context: ssl.SSLContext, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> ssl.SSLObject:
    context.check_hostname = False
    try:
        return context.wrap_bio(incoming, outgoing)
    finally:
        context.check_hostname = True


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise ValueError(f"{what} does not stand before the CA: {error.verify_message}") from error
    except ssl.SSLError as error:
        reason = {"KEY_VALUES_MISMATCH": "they do not belong together"}.get(error.reason or "", "they are no valid PEM")
        raise ValueError(f"{what} cannot be used: {reason}") from error
    except OSError as error:
        raise ValueError(f"{what} cannot be read: {error.strerror}") from error


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
