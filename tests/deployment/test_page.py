"""docs/deployment.md followed from nothing to a finished run, and who gets in by the doors that it opens."""

import http.client
import shutil
import sqlite3
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from flwr.proto.control_pb2 import ListRunsRequest, RegisterNodeRequest, StartRunRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, RegisterNodeFleetRequest
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from bora_fl.deployment.certificates import make_client, make_server, sign
from bora_fl.report import training_rows
from tests.deployment.page import Federation

pytestmark = [
    pytest.mark.deployment,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not shutil.which("nginx", path="/usr/sbin:/usr/bin"), reason="nginx is not installed"),
]
Client = tuple[Path, Path] | None


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = Federation(tmp_path_factory.mktemp("page"))
    try:
        try:
            assert made.follow() == 14
        except AssertionError as error:
            raise AssertionError(f"{error}\n{made.logs()}") from error
        yield made
    finally:
        made.close()


def pair(folder: Path) -> Client:
    return folder / "client.crt", folder / "client.key"


def ask(port: int, path: str, body: bytes, client: Client = None) -> int:
    """Ask as one who verifies no certificate does, and return the status; 0 if the handshake fails."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if client:
        context.load_cert_chain(*client)
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=60, context=context)
    try:
        connection.request("POST", path, body, {"content-type": PROTOBUF_MEDIA_TYPE, "accept": PROTOBUF_MEDIA_TYPE})
        return connection.getresponse().status
    except ssl.SSLError:
        return 0
    finally:
        connection.close()


def requests() -> dict[str, bytes]:
    """What an intruder asks: list runs, register a node in both ways, submit a run, take a task."""
    public = public_key_to_bytes(generate_key_pairs()[1])
    asked = {
        "/v1/control/list-runs": ListRunsRequest(),
        "/v1/control/register-node": RegisterNodeRequest(public_key=public),
        "/v1/control/start-run": StartRunRequest(),
        "/v1/fleet/register-node": RegisterNodeFleetRequest(public_key=public),
    }
    return {path: message.SerializeToString() for path, message in asked.items()} | {"/v1/runtime/acquire-task": b""}


def counts(federation: Federation) -> list[int]:
    """How many nodes and runs the SuperLink knows."""
    with sqlite3.connect(federation.server.folder / "lib" / "state.db") as database:
        return [database.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("node", "run")]


def test_the_page_leads_to_a_finished_run(federation: Federation):
    library = federation.server.folder / "lib"
    first = library / "runs" / "first"
    assert [row["clients"] for row in training_rows(first / "metrics.jsonl")] == [2, 2]
    assert (first / "adapter" / "adapter_model.safetensors").is_file()
    for private in (library / "state.db", first / "metrics.jsonl"):
        assert not stat.S_IMODE(private.stat().st_mode) & 0o077
    for site in federation.sites:
        assert any((site.folder / "lib" / "state").iterdir())  # its audit log is where BORA_FL_STATE says


def test_who_verifies_nothing_and_has_no_certificate_gets_nothing(federation: Federation, tmp_path: Path):
    before = counts(federation)
    make_server(tmp_path, ["localhost"])
    make_client(tmp_path, "eve")
    foreign = sign(tmp_path / "eve.csr", "site", tmp_path)
    for path, body in requests().items():
        for port in (federation.ports["8443"], federation.ports["8444"]):
            assert ask(port, path, body) == 400
            assert ask(port, path, body, (foreign, tmp_path / "client.key")) == 400
    assert counts(federation) == before
    # The same request is answered where it is let through: what is tested is the door, not the request.
    listing = requests()["/v1/control/list-runs"]
    assert ask(federation.ports["9091"], "/v1/control/list-runs", listing) == 200


SPELLINGS = (
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/..%2fcontrol/list-runs",
    "/v1/fleet/pull-messages/../../control/list-runs",
    "/v1/fleet/pull-messages%2f..%2f..%2fcontrol%2flist-runs",
    "//v1/control/list-runs",
    "/v1/fleet/pull-messages;/../../control/list-runs",
    "https://localhost/v1/control/list-runs",
)


def test_a_certified_site_reaches_the_fleet_api_alone(federation: Federation):
    before = counts(federation)
    site = pair(federation.sites[0].folder / "etc")
    fleet, control = federation.ports["8443"], federation.ports["8444"]
    for path, body in requests().items():
        assert ask(fleet, path, body, site) == 404
        assert ask(control, path, body, site) in {403, 404}
    listing = requests()["/v1/control/list-runs"]
    for path in SPELLINGS:
        assert ask(fleet, path, listing, site) in {400, 404}, path
        assert ask(control, path, listing, site) in {400, 403, 404}, path
    assert counts(federation) == before


def test_a_certified_operator_reaches_the_control_api_alone(federation: Federation):
    operator = pair(federation.operator.folder / "etc")
    statuses = {path: ask(federation.ports["8444"], path, body, operator) for path, body in requests().items()}
    assert statuses["/v1/control/list-runs"] == 200
    assert statuses["/v1/runtime/acquire-task"] == statuses["/v1/fleet/register-node"] == 404
    for path in (*requests(), "/v1/fleet/activate-node"):
        assert ask(federation.ports["8443"], path, b"", operator) in {403, 404}


def test_an_operator_works_through_the_uplink(federation: Federation):
    federation.operator.execute("flwr ls hospitals --format json > runs.json")
    assert "finished:completed" in (federation.operator.folder / "checkout" / "runs.json").read_text()


def test_a_certified_site_needs_a_registered_key(federation: Federation):
    uplink = federation.sites[0].here("localhost:9443")
    private, public = generate_key_pairs()
    request = ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=30)
    with (
        FleetHttpClient.from_server_address(
            uplink,
            False,
            (federation.sites[0].folder / "etc" / "uplink.pem").read_bytes(),
            interceptors=[NodeAuthHttpInterceptor(private, public)],
        ) as client,
        pytest.raises(httpx.HTTPStatusError, match="412"),  # there is no such node
    ):
        client.ActivateNode(request)


def test_all_that_listens_does_so_on_loopback(federation: Federation):
    """But for the server's proxies, whose configurations name all addresses on the page."""
    for machine in federation.machines:
        for service in machine.services:
            family = [psutil.Process(service.pid), *psutil.Process(service.pid).children(recursive=True)]
            listening = [c.laddr for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
            assert all(address.ip == "127.0.0.1" for address in listening), (service.name, listening)
