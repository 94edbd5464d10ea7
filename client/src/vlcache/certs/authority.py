"""A CA of one's own, for development and tests, and what it signs. Needs cryptography."""

import datetime
import ipaddress
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

ROLE_URI = "spiffe://vlcache/"
# Who gets a certificate, and the roles that it names. A client's opens the doors that are open to everybody.
LEAVES = {
    "router": ("router",),
    "prefill": ("prefill",),
    "decode": ("decode",),
    "combined": ("prefill", "decode"),
    "client": ("client",),
}
DEFAULT_HOSTS = ("localhost", "127.0.0.1", "::1")
DEFAULT_DAYS = 90
CA_DAYS = 3650
# Clocks of machines differ.
BACKDATED = datetime.timedelta(minutes=10)


class Authority:
    """A CA in a folder: ca.pem, and ca.key, which can sign certificates for every role."""

    def __init__(self, folder: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._folder = folder
        self._certificate = certificate
        self._key = key

    @classmethod
    def open(cls, folder: Path) -> "Authority":
        """The CA of a folder, which is made where there is none. Raises OSError, or ValueError for unreadable files."""
        folder.mkdir(parents=True, exist_ok=True)
        certificate_file, key_file = folder / "ca.pem", folder / "ca.key"
        if certificate_file.exists():
            key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise ValueError(f"{key_file} is not a key that was made here")
            return cls(folder, x509.load_pem_x509_certificate(certificate_file.read_bytes()), key)
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _self_signed(key)
        _write(key_file, _pem_of_key(key), mode=0o600)
        _write(certificate_file, _pem(certificate), mode=0o644)
        return cls(folder, certificate, key)

    def issue(
        self, name: str, roles: Iterable[str], *, hosts: Sequence[str] = DEFAULT_HOSTS, days: float = DEFAULT_DAYS
    ) -> list[Path]:
        """Writes NAME.pem and NAME.key, in place of those that are there, and returns both.

        roles: what the certificate names.
        hosts: DNS names and addresses at which its owner listens.
        days: how long it is valid from now on.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        now = _now()
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"vlcache {name}")])
        builder = _builder(subject, self._certificate.subject, key, now + datetime.timedelta(days=days))
        names = [*(x509.UniformResourceIdentifier(ROLE_URI + role) for role in roles), *map(_host_name, hosts)]
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(_authority_of(self._key), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        files = [self._folder / f"{name}.key", self._folder / f"{name}.pem"]
        # who looks between the two finds that they do not belong together, and looks again
        _write(files[0], _pem_of_key(key), mode=0o600)
        _write(files[1], _pem(certificate), mode=0o644)
        return files


def make_certificates(folder: Path, *, hosts: Sequence[str] = DEFAULT_HOSTS, days: int = DEFAULT_DAYS) -> list[Path]:
    """Makes, or renews, a certificate for every role; returns the files. The CA stays the one that is there.

    Raises OSError when they cannot be written, ValueError when a host is none or the CA's files cannot be read.
    """
    authority = Authority.open(folder)
    written = [authority.issue(name, roles, hosts=hosts, days=days) for name, roles in LEAVES.items()]
    return [folder / "ca.pem", *(file for files in written for file in files)]


def _self_signed(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vlcache development CA")])
    return (
        _builder(name, name, key, _now() + datetime.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(_authority_of(key), critical=False)
        .sign(key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, until: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(_now(), until) - BACKDATED)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _authority_of(key: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _pem_of_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())


def _write(file: Path, content: bytes, *, mode: int) -> None:
    """Whole or not at all, and never readable for others meanwhile."""
    part = file.with_name(file.name + ".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as out:
        out.write(content)
    part.replace(file)
