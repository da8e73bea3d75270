"""Whether the SuperLink knows a site's key, asked of itself without any effect."""

import base64
import http.client
import ssl
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from bora_fl.deployment.doctor.finding import Finding
from bora_fl.deployment.doctor.network import TIMEOUT

SUBJECT = "the site's key"
# Flower 1.41 looks a key up before it reads the interval of heartbeats, and activates nothing for one out of bounds.
_NO_INTERVAL = 0.0


def check_registered(
    host: str, port: int, authority: Path | None, site_key: Path, client: tuple[Path, Path] | None = None
) -> Finding:
    """Whether a SuperNode with this key would be let in: the key is asked about as a SuperNode proves it.

    The question is to activate a node whose heartbeats have no interval, which a SuperLink refuses with one code for a
    registered key and with another one for an unknown key.

    Args:
        host: Of the SuperLink or the proxy before it.
        port: Of the same.
        authority: ``ca.crt``; the system's authorities by default.
        site_key: The SuperNode's private key.
        client: Certificate and key to show to a proxy.
    """
    key = load_ssh_private_key(site_key.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        return Finding(SUBJECT, "fail", "is not an elliptic-curve key", "make one with `bora-fl certificates site`")
    try:
        status, body = _ask(host, port, authority, key, client)
    except (OSError, http.client.HTTPException) as error:
        text = f"could not be asked about ({error}): whether it is registered is not known"
        return Finding(SUBJECT, "warn", text, "mend the way to the SuperLink first")
    said = FlowerError.from_json(body)
    code = said.code if said else None
    if code == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
        return Finding(SUBJECT, "pass", "is registered with the SuperLink")
    if code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        remedy = f"have the server run `flwr supernode register {site_key.name}.pub CONNECTION`"
        return Finding(SUBJECT, "fail", "is not registered with the SuperLink", remedy)
    if status == http.client.UNAUTHORIZED:
        return Finding(SUBJECT, "fail", "is not accepted as proof (HTTP 401)", "compare the clocks at both ends")
    text = f"the SuperLink answers with HTTP {status}: whether the key is registered is not known"
    return Finding(SUBJECT, "warn", text, "ask the server for `flwr supernode list`")


def _ask(
    host: str, port: int, authority: Path | None, key: ec.EllipticCurvePrivateKey, client: tuple[Path, Path] | None
) -> tuple[int, str]:
    public, moment = public_key_to_bytes(key.public_key()), now().isoformat()
    headers = {
        "content-type": PROTOBUF_MEDIA_TYPE,
        "accept": PROTOBUF_MEDIA_TYPE,
        FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(public).decode(),
        TIMESTAMP_HEADER: moment,
        FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(sign_message(key, moment.encode())).decode(),
    }
    context = ssl.create_default_context(cafile=str(authority) if authority else None)
    if client:
        context.load_cert_chain(*client)
    connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT, context=context)
    try:
        question = ActivateNodeRequest(public_key=public, heartbeat_interval=_NO_INTERVAL)
        connection.request("POST", "/v1/fleet/activate-node", question.SerializeToString(), headers)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()
