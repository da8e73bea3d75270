"""What a federation over TLS needs to start: a certificate authority, the server's certificate, keys of the sites.

The authority made here is for development and for small federations that trust whoever runs the server; an organisation
with an authority of its own issues the server's certificate from that one. Nothing is ever overwritten, and whatever is
secret is readable by its owner alone.
"""

import datetime
import ipaddress
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bora_fl.config import ConfigError

SECRET = "superexec.secret"
# A site whose clock is behind the server's must not take a fresh certificate for one of the future.
CLOCK_TOLERANCE = datetime.timedelta(hours=1)


def make_server(folder: Path, hosts: Sequence[str], days: int = 365) -> list[Path]:
    """Make an authority, the server's certificate and the secret of its SuperExec.

    Args:
        folder: Where to; made if it is missing.
        hosts: DNS names and IP addresses that the sites dial.
        days: How long the certificates are valid.

    Returns:
        ``ca.crt`` (goes to every site), ``ca.key``, ``server.pem``, ``server.key``, ``superexec.secret`` (stay here).

    Raises:
        ConfigError: If no host is given or a file is there already.
    """
    if not hosts:
        raise ConfigError("--host: name at least one DNS name or IP address that the sites dial")
    paths = [folder / name for name in ("ca.crt", "ca.key", "server.pem", "server.key", SECRET)]
    _refuse_to_overwrite(paths)
    lifetime = datetime.timedelta(days=days)
    authority_key, server_key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    authority = _authority(authority_key, lifetime)
    server = _server(server_key, authority, authority_key, hosts, lifetime)
    contents = (_pem(authority), _private(authority_key), _pem(server), _private(server_key), secrets.token_bytes(32))
    for path, content in zip(paths, contents, strict=True):
        _write(path, content, secret=path.suffix not in {".crt", ".pem"})
    return paths


def make_site(folder: Path, name: str) -> list[Path]:
    """Make a site's key pair, in the OpenSSH form that Flower wants, and the secret of its SuperExec.

    Args:
        folder: Where to, on the site's own machine; made if it is missing.
        name: Names the files.

    Returns:
        ``<name>.key`` (never leaves the site), ``<name>.key.pub`` (goes to the server), ``superexec.secret`` (stays).

    Raises:
        ConfigError: If a file is there already.
    """
    paths = [folder / f"{name}.key", folder / f"{name}.key.pub", folder / SECRET]
    _refuse_to_overwrite(paths)
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    contents = (private, public + f" {name}\n".encode(), secrets.token_bytes(32))
    for path, content in zip(paths, contents, strict=True):
        _write(path, content, secret=path.suffix != ".pub")
    return paths


def _authority(key: ec.EllipticCurvePrivateKey, lifetime: datetime.timedelta) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bora-fl federation")])
    builder = _builder(name, name, key, lifetime).add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
    return builder.add_extension(_usage(key_cert_sign=True, crl_sign=True), True).sign(key, hashes.SHA384())


def _server(
    key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    hosts: Sequence[str],
    lifetime: datetime.timedelta,
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    builder = _builder(name, authority.subject, key, lifetime)
    for extension, critical in (
        (x509.SubjectAlternativeName([_alternative(host) for host in hosts]), False),
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(digital_signature=True), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), False),
    ):
        builder = builder.add_extension(extension, critical)
    return builder.sign(authority_key, hashes.SHA384())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, lifetime: datetime.timedelta
) -> x509.CertificateBuilder:
    start = datetime.datetime.now(datetime.UTC) - CLOCK_TOLERANCE
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + CLOCK_TOLERANCE + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(**granted: bool) -> x509.KeyUsage:
    names = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**(dict.fromkeys(names, False) | granted))


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _refuse_to_overwrite(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.exists():
            raise ConfigError(f"{path} is there already; name another folder, or delete it if it is not in use")


def _write(path: Path, content: bytes, *, secret: bool) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644), "wb") as file:
        file.write(content)
