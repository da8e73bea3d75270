"""The way to the SuperLink: TCP, TLS, Flower's answer, and how far the two clocks are apart."""

import http.client
import socket
import ssl
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

from bora_fl.deployment.doctor.finding import Finding

TIMEOUT = 10.0
# Flower 1.41 refuses an authenticated site whose clock is this many seconds ahead of the server's, or behind it.
AHEAD, BEHIND = 5.0, 305.0
RESOLUTION = 1.0  # of the Date header


@dataclass(frozen=True)
class Answer:
    """What the SuperLink's health page said: status, and its clock minus this machine's, in seconds, if it told."""

    status: int
    skew: float | None


def ask(host: str, port: int, authority: Path | None, client: tuple[Path, Path] | None = None) -> Answer:
    """Ask a SuperLink, or the proxy before it, for its health over TLS.

    Args:
        host: Of the SuperLink or the proxy.
        port: Of the same.
        authority: ``ca.crt``; the system's authorities by default.
        client: Certificate and key to show to a proxy.

    Raises:
        OSError: If there is no way to it; `ssl.SSLCertVerificationError` if it is not to be trusted.
    """
    context = ssl.create_default_context(cafile=str(authority) if authority else None)
    if client:
        context.load_cert_chain(*client)
    connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT, context=context)
    try:
        before = time.time()
        connection.request("GET", "/health")
        response = connection.getresponse()
        here = (before + time.time()) / 2
        date = response.getheader("Date")
        # The header cuts fractions of a second off.
        skew = parsedate_to_datetime(date).timestamp() + RESOLUTION / 2 - here if date else None
        return Answer(response.status, skew)
    except http.client.HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
    finally:
        connection.close()


def check_reachable(
    host: str, port: int, authority: Path | None, client: tuple[Path, Path] | None = None
) -> tuple[Finding, Answer | None]:
    """Whether a SuperLink answers, and can be trusted.

    Args:
        host: Of the SuperLink or the proxy before it.
        port: Of the same.
        authority: See `ask`.
        client: See `ask`.
    """
    subject = f"SuperLink {host}:{port}"
    try:
        answer = ask(host, port, authority, client)
    except ssl.SSLCertVerificationError as error:
        remedy = "use the ca.crt of this server, and dial a name that its certificate holds"
        return Finding(subject, "fail", f"is not trusted: {error.verify_message or error.reason}", remedy), None
    except ssl.SSLError as error:
        return Finding(subject, "fail", f"does not speak TLS ({error.reason})", "check port and proxy"), None
    except socket.gaierror as error:
        return Finding(subject, "fail", f"has no address ({error.strerror})", "check the name and the DNS"), None
    except OSError as error:
        text = f"cannot be reached ({error.strerror or error})"
        return Finding(subject, "fail", text, "start it, or open the firewall for outgoing connections"), None
    if answer.status == 400 and not client:
        remedy = "give --client-certificate and --client-key, signed by `bora-fl certificates sign`"
        return Finding(subject, "fail", "wants a client's certificate (HTTP 400)", remedy), answer
    if answer.status != 200:
        remedy = "check that the address is the SuperLink's and not a proxy's"
        return Finding(subject, "fail", f"answers with HTTP {answer.status}", remedy), answer
    return Finding(subject, "pass", "answers over TLS"), answer


def check_clock(skew: float | None) -> Finding:
    """Whether the clocks agree as far as node authentication needs it.

    Args:
        skew: The SuperLink's clock minus this machine's in seconds; None if it is not known.
    """
    if skew is None:
        return Finding("clock", "warn", "the SuperLink does not tell its time", "keep NTP running at both ends")
    text = f"{abs(skew):.1f} s {'behind' if skew > 0 else 'ahead of'} the SuperLink's"
    if -skew > AHEAD + RESOLUTION or skew > BEHIND:
        text += f"; nodes more than {AHEAD:.0f} s ahead or {BEHIND:.0f} s behind are refused"
        return Finding("clock", "fail", text, "run NTP here and on the server")
    if -skew > AHEAD / 2 or skew > BEHIND / 10:
        return Finding("clock", "warn", text, "run NTP here and on the server")
    return Finding("clock", "pass", text)
