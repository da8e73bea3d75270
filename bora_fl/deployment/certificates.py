"""What a federation over TLS needs to start: a certificate authority, the server's certificate, keys of the sites.

The authority made here is for development and for small federations that trust whoever runs the server; an organisation
with an authority of its own issues the server's certificate from that one. Nothing is ever overwritten, and whatever is
secret is readable by its owner alone.
"""

import datetime
import ipaddress
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bora_fl.config import ConfigError

Role = Literal["site", "operator"]
SECRET = "superexec.secret"
# A site whose clock is behind the server's must not take a fresh certificate for one of the future.
CLOCK_TOLERANCE = datetime.timedelta(hours=1)
UPLINK_LIFETIME = datetime.timedelta(days=3650)  # it is shown on loopback alone


def make_server(folder: Path, hosts: Sequence[str], days: int = 365) -> list[Path]:
    """Make an authority, the server's certificate and the secret of its SuperExec.

    Args:
        folder: Where to; made if it is missing.
        hosts: DNS names and IP addresses that the sites dial.
        days: How long the certificates are valid.

    Returns:
        ``ca.crt`` (goes to every site), ``ca.key``, ``server.pem``, ``server.key``, ``superexec.secret`` (stay here).

    Raises:
        ConfigError: If no host is given, one is no DNS name or IP address, or a file is there already.
    """
    if not hosts:
        raise ConfigError("--host: name at least one DNS name or IP address that the sites dial")
    names = [_alternative(host) for host in hosts]
    paths = [folder / name for name in ("ca.crt", "ca.key", "server.pem", "server.key", SECRET)]
    _refuse_to_overwrite(paths)
    lifetime = datetime.timedelta(days=days)
    authority_key, server_key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    authority = _authority(authority_key, lifetime)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    leaf = _leaf(server_key.public_key(), subject, authority, ExtendedKeyUsageOID.SERVER_AUTH, lifetime)
    leaf = leaf.add_extension(x509.SubjectAlternativeName(names), False)
    server = leaf.sign(authority_key, hashes.SHA384())
    contents = (_pem(authority), _private(authority_key), _pem(server), _private(server_key), secrets.token_bytes(32))
    for path, content in zip(paths, contents, strict=True):
        _write(path, content, secret=path.suffix not in {".crt", ".pem"})
    return paths


def make_site(folder: Path, name: str) -> list[Path]:
    """Make a site's key pair, in the OpenSSH form that Flower wants, and the secret of its SuperExec.

    Args:
        folder: Where to, on the site's own machine; made if it is missing.
        name: Names what goes to the server.

    Returns:
        ``site.key`` (never leaves the site), ``<name>.key.pub`` (goes to the server), ``superexec.secret`` (stays).

    Raises:
        ConfigError: If the name cannot stand in a certificate, or a file is there already.
    """
    _client_name(name)  # before anything is written, since `make_client` takes the same name
    paths = [folder / "site.key", folder / f"{name}.key.pub", folder / SECRET]
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


def make_client(folder: Path, name: str) -> list[Path]:
    """Make what a site or an operator needs for the way to the server's proxy, and the request to certify its key.

    Flower's programs have no certificate of a client, so a proxy on their own machine, the uplink, has it; to them, who
    insist on TLS, it shows a certificate for ``localhost`` of its own.

    Args:
        folder: Where to, on the client's own machine; made if it is missing.
        name: Names the request.

    Returns:
        ``client.key`` (never leaves the machine), ``<name>.csr`` (goes to the server to be signed),
        ``uplink.pem`` and ``uplink.key`` (stay).

    Raises:
        ConfigError: If the name cannot stand in a certificate, or a file is there already.
    """
    subject = _client_name(name)
    paths = [folder / each for each in ("client.key", f"{name}.csr", "uplink.pem", "uplink.key")]
    _refuse_to_overwrite(paths)
    key = ec.generate_private_key(ec.SECP384R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA384())
    uplink = ec.generate_private_key(ec.SECP384R1())
    itself = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    builder = _builder(itself, itself, uplink.public_key(), UPLINK_LIFETIME)
    builder = builder.add_extension(x509.SubjectAlternativeName([_alternative("localhost")]), False)
    shown = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True).sign(uplink, hashes.SHA384())
    contents = (_private(key), request.public_bytes(serialization.Encoding.PEM), _pem(shown), _private(uplink))
    for path, content in zip(paths, contents, strict=True):
        _write(path, content, secret=path.suffix == ".key")
    return paths


def sign(request: Path, role: Role, authority: Path, days: int = 365) -> Path:
    """Certify a client. What it may do is the signer's word: nothing of the request but its key is taken over.

    Args:
        request: ``<name>.csr``; the file's name is the client's.
        role: Stands in the certificate as its organizational unit, by which the proxy tells clients apart.
        authority: Folder of ``ca.crt`` and ``ca.key``.
        days: How long the certificate is valid.

    Returns:
        ``<name>.crt`` beside the request.

    Raises:
        ConfigError: If request or authority cannot be used, or the certificate is there already.
    """
    subject, path = _client_name(request.stem, role), request.with_suffix(".crt")
    _refuse_to_overwrite([path])
    try:
        asked = x509.load_pem_x509_csr(request.read_bytes())
        issuer = x509.load_pem_x509_certificate((authority / "ca.crt").read_bytes())
        key = serialization.load_pem_private_key((authority / "ca.key").read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{request} cannot be signed with {authority}/ca.key: {error}") from None
    if not asked.is_signature_valid or not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{request}: not signed by its own key, or {authority}/ca.key is no elliptic-curve key")
    leaf = _leaf(asked.public_key(), subject, issuer, ExtendedKeyUsageOID.CLIENT_AUTH, datetime.timedelta(days=days))
    _write(path, _pem(leaf.sign(key, hashes.SHA384())), secret=False)
    return path


def _client_name(name: str, role: Role | None = None) -> x509.Name:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ConfigError(f"{name!r}: a client's name has letters, digits, dots, hyphens and underscores, at most 64")
    unit = [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role)] if role else []
    return x509.Name([*unit, x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _authority(key: ec.EllipticCurvePrivateKey, lifetime: datetime.timedelta) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bora-fl federation")])
    builder = _builder(name, name, key.public_key(), lifetime).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), True
    )
    return builder.add_extension(_usage(key_cert_sign=True, crl_sign=True), True).sign(key, hashes.SHA384())


def _leaf(
    key: CertificatePublicKeyTypes,
    subject: x509.Name,
    authority: x509.Certificate,
    purpose: x509.ObjectIdentifier,
    lifetime: datetime.timedelta,
) -> x509.CertificateBuilder:
    builder = _builder(subject, authority.subject, key, lifetime)
    issuer = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(digital_signature=True), True),
        (x509.ExtendedKeyUsage([purpose]), False),
        (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), False),
    ):
        builder = builder.add_extension(extension, critical)
    return builder


def _builder(
    subject: x509.Name, issuer: x509.Name, key: CertificatePublicKeyTypes, lifetime: datetime.timedelta
) -> x509.CertificateBuilder:
    start = datetime.datetime.now(datetime.UTC) - CLOCK_TOLERANCE
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + CLOCK_TOLERANCE + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), False)
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not re.fullmatch(r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9._-]{0,252})", host):
            text = "is no DNS name or IP address; leave out scheme and port, and write other alphabets as xn--..."
            raise ConfigError(f"--host {host!r}: {text}") from None
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
