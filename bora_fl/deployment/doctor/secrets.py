"""Certificates, keys and secrets: readable, of the right form, belonging together, and nobody else's to read."""

import datetime
import ipaddress
import stat
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

from bora_fl.deployment.doctor.finding import Finding

SOON = datetime.timedelta(days=30)
_CURVES = ("secp256r1", "secp384r1", "secp521r1")


def check_private(path: Path) -> Finding:
    """Whether a secret file is there, not empty, and readable by its owner alone."""
    subject = str(path)
    try:
        mode, content = stat.S_IMODE(path.stat().st_mode), path.read_bytes()
    except OSError as error:
        return Finding(subject, "fail", f"cannot be read: {error.strerror}", "run as the user whose file it is")
    if not content:
        return Finding(subject, "fail", "is empty", "make it anew with `bora-fl certificates`")
    if mode & 0o077:
        return Finding(subject, "warn", f"has mode {mode:o}: others may read it", f"chmod 600 {path}")
    return Finding(subject, "pass", "readable by its owner alone")


def check_shared(path: Path) -> Finding:
    """Whether a file that tells of the run or of what the sites have sent is readable by its owner alone.

    Args:
        path: Such as the SuperLink's database; it may be missing.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return Finding(str(path), "pass", "will be made")
    except OSError as error:
        return Finding(str(path), "fail", f"cannot be read: {error.strerror}", "run as the user whose file it is")
    if mode & 0o077:
        remedy = f"chmod 600 {path}, and start the services with UMask=0077"
        return Finding(str(path), "warn", f"has mode {mode:o}: others may read what sites have sent", remedy)
    return Finding(str(path), "pass", "readable by its owner alone")


def check_site_key(path: Path) -> Finding:
    """Whether a SuperNode can authenticate with a key: elliptic-curve, in the OpenSSH form, without a passphrase."""
    subject, remedy = str(path), "make one with `bora-fl certificates site` and register its .pub"
    private = check_private(path)
    if private.level == "fail":
        return private
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, TypeError) as error:
        return Finding(subject, "fail", f"is no OpenSSH private key without passphrase ({error})", remedy)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        return Finding(subject, "fail", "is not an elliptic-curve key on a NIST curve", remedy)
    return (
        private
        if private.level == "warn"
        else Finding(
            subject,
            "pass",
            f"a key of the form that Flower takes ({key.curve.name})",
        )
    )


def check_expiry(subject: str, certificate: x509.Certificate, now: datetime.datetime) -> Finding:
    """Whether a certificate is valid at a moment, and for how long.

    Args:
        subject: What it is called in the report.
        certificate: The certificate.
        now: With a time zone.
    """
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < start:
        return Finding(subject, "fail", f"is valid from {start:%Y-%m-%d %H:%M} UTC on", "check this machine's clock")
    if now > end:
        return Finding(subject, "fail", f"expired on {end:%Y-%m-%d}", "issue a new one")
    if end - now < SOON:
        return Finding(subject, "warn", f"expires on {end:%Y-%m-%d}", "issue a new one in time")
    return Finding(subject, "pass", f"valid until {end:%Y-%m-%d}")


def check_name(certificate: x509.Certificate, host: str) -> Finding:
    """Whether a server's certificate is for the host that the sites dial."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    dns = names.get_values_for_type(x509.DNSName)
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    try:
        good = str(ipaddress.ip_address(host)) in addresses
    except ValueError:
        wild = "*." + host.partition(".")[2]
        good = host.lower() in {name.lower() for name in dns} or wild.lower() in {name.lower() for name in dns}
    known = ", ".join([*dns, *addresses]) or "nothing"
    if good:
        return Finding("certificate's names", "pass", f"{host} is among {known}")
    return Finding(
        "certificate's names",
        "fail",
        f"it is for {known}, not for {host}",
        f"dial one of those, or issue it with --host {host}",
    )


def check_pair(certificate: x509.Certificate, key: Path) -> Finding:
    """Whether a key is that of a certificate."""
    private = check_private(key)
    if private.level == "fail":
        return private
    try:
        loaded = load_pem_private_key(key.read_bytes(), None)
    except (ValueError, TypeError) as error:
        return Finding(str(key), "fail", f"is no PEM private key without passphrase ({error})", "convert it to PKCS 8")
    if loaded.public_key() != certificate.public_key():
        return Finding(str(key), "fail", "is not the certificate's key", "name the two files that were made together")
    return private if private.level == "warn" else Finding(str(key), "pass", "is the certificate's key")


def check_chain(certificate: x509.Certificate, authority: x509.Certificate) -> Finding:
    """Whether a certificate was issued by an authority."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        text = f"the server's certificate is by {certificate.issuer.rfc4514_string()}, not by this authority"
        return Finding("certificate's authority", "fail", text, "give the sites the ca.crt that issued it")
    return Finding("certificate's authority", "pass", "issued the server's certificate")


def load_certificate(path: Path) -> x509.Certificate | Finding:
    """A PEM certificate, or why there is none."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        return Finding(str(path), "fail", f"cannot be read: {error.strerror}", "name the file, or mend its permissions")
    except ValueError:
        return Finding(str(path), "fail", "is no PEM certificate", "name the certificate, not its key")
