"""Three organisations on loopback: TLS, node authentication, SuperExec secrets. One deployment serves all tests."""

import base64
import os
import signal
import ssl
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from bora_fl.deployment.certificates import SECRET, make_server, make_site
from bora_fl.deployment.doctor.registration import check_registered
from bora_fl.deployment.loopback import CONNECTION, Deployment, DeploymentError, Site, finished, free_port
from bora_fl.deployment.processes import Service, tool
from bora_fl.simulations.engine import simulate

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(600)]

# The default model and data, cut short.
CONFIG = {
    "data.max-train-examples": 600,
    "data.max-test-examples": 200,
    "model.max-length": 32,
    "train.local-steps": 3,
    "train.batch-size": 8,
    "run.num-rounds": 2,
    "run.evaluate-every": 2,
    "run.threads": 1,
}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with Deployment(tmp_path_factory.mktemp("deployment")) as running:
        yield running
    assert not [service.name for service in running.services if service.pid]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def ended(service: Service, seconds: float = 60) -> str:
    """Wait for a process that must give up by itself, and return its log."""
    try:
        assert service.wait(seconds) is not None, f"{service.name} was not turned away:\n{service.tail()}"
        return service.log.read_text()
    finally:
        service.stop()


def test_a_fine_tune_over_tls_equals_the_simulation_and_no_foreign_superexec_gets_it(
    deployment: Deployment, tmp_path: Path
):
    deployment.executor.stop()
    (tmp_path / SECRET).write_bytes(b"x" * 32)
    strangers = [
        Service(name, deployment.superexec(secret), tmp_path / name, deployment.environment)
        for name, secret in (("no-secret", None), ("wrong-secret", tmp_path / SECRET))
    ]
    run = deployment.submit(CONFIG)
    for stranger in strangers:
        stranger.start()
    for stranger in strangers:
        log = ended(stranger)
        assert "flwr-serverapp" not in log
    assert not deployment.rounds()
    deployment.executor.start()
    finished(run, 400, deployment.services)
    assert [(row["clients"], row["rejected"]) for row in deployment.rounds()] == [(3, 0)] * 2
    assert [site.work().base_loads for site in deployment.sites] == [1] * 3
    deployed = adapter(deployment.output)
    simulated = adapter(simulate(CONFIG | {"run.output-dir": str(tmp_path / "simulated")}, 3))
    assert deployed.keys() == simulated.keys()
    for name in simulated:
        torch.testing.assert_close(deployed[name], simulated[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("registered", [False, True], ids=["unregistered", "registered-with-another-key"])
def test_a_node_without_a_registered_key_is_refused(registered: bool, deployment: Deployment, tmp_path: Path):
    stranger = Site(3 + registered, deployment)
    asked = ("127.0.0.1", deployment.port, deployment.authority, stranger.folder / "keys" / "site.key")
    assert check_registered(*asked).level == "fail"
    if registered:
        deployment.flwr("supernode", "register", str(stranger.public_key), CONNECTION)
        assert check_registered(*asked).level == "pass"
        other, _, _ = make_site(tmp_path, "other")
        stranger = Site(5, deployment, key=other)
    stranger.node.start()
    assert "Failed to activate SuperNode" in ended(stranger.node)
    assert deployment.flwr("supernode", "list", CONNECTION, "--format", "json").count('"online"') == 3


def test_nobody_talks_to_the_superlink_without_its_authority(deployment: Deployment, tmp_path: Path):
    ours, _, theirs = deployment.authority, None, make_server(tmp_path / "theirs", ["localhost", "127.0.0.1"])[0]
    url = f"https://{deployment.address}/health"
    urllib.request.urlopen(url, timeout=10, context=ssl.create_default_context(cafile=str(ours))).close()
    for context in (ssl.create_default_context(), ssl.create_default_context(cafile=str(theirs))):
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            urllib.request.urlopen(url, timeout=10, context=context)
    deployment.write_connection("stranger", theirs)
    with pytest.raises(DeploymentError):
        deployment.flwr("ls", CONNECTION, home="stranger")


def test_a_node_without_the_authority_is_refused(deployment: Deployment, tmp_path: Path):
    node = deployment.sites[0].node
    theirs = make_server(tmp_path / "theirs", ["localhost", "127.0.0.1"])[0]
    command = [part if part != str(deployment.authority) else str(theirs) for part in node.command]
    command[command.index("--port") + 1] = str(free_port())
    stranger = Service("no-authority", [*command, "--max-retries", "1"], tmp_path, node.environment)
    stranger.start()
    assert "CERTIFICATE_VERIFY_FAILED" in ended(stranger)


def test_a_securely_aggregated_fine_tune_is_the_plain_one(deployment: Deployment, tmp_path: Path):
    """Up to the 22 bits of a masked entry, of which Adam would make whole steps in a second round."""
    config = CONFIG | {"strategy.name": "fedavg", "strategy.weighting": "uniform", "run.num-rounds": 1}
    config |= {"head.init": "random"}  # under secure aggregation there is no other
    secure = {"privacy.secure-aggregation": True, "run.output-dir": str(tmp_path / "secure")}
    finished(deployment.submit(config | secure), 400, deployment.services)
    deployed = adapter(tmp_path / "secure")
    simulated = adapter(simulate(config | {"run.output-dir": str(tmp_path / "plain")}, 3))
    for name in simulated:
        torch.testing.assert_close(deployed[name], simulated[name], rtol=0, atol=5e-5)


def test_a_run_outlives_its_follower_is_found_again_and_stopped(deployment: Deployment, tmp_path: Path):
    config = CONFIG | {"run.num-rounds": 50, "head.init": "random"}  # round 1 comes sooner without its questions
    run = deployment.submit(config | {"run.output-dir": str(tmp_path / "stopped")})
    for line in run.follow():
        if line.startswith("round 1/50"):
            os.kill(run.pid or 0, signal.SIGINT)
    assert run.wait(0) == 130
    run_id = run.text().rpartition("--attach ")[2].split()[0]
    assert '"running"' in deployment.flwr("ls", CONNECTION, "--run-id", run_id, "--format", "json")
    command = [tool("bora-fl"), "run", CONNECTION, "--attach", run_id]
    follower = deployment.operator("follower", command)
    follower.start()
    for line in follower.follow():
        if line.startswith("round 1/50"):
            stopper = deployment.operator("stopper", [tool("bora-fl"), "stop", run_id, CONNECTION])
            stopper.start()
    assert stopper.wait(60) == 0
    assert follower.wait(0) == 1
    assert "finished:stopped" in follower.text()


def test_no_log_and_no_command_line_tells_a_secret(deployment: Deployment):
    secret_files = [*deployment.folder.rglob("*.key"), *deployment.folder.rglob(SECRET)]
    assert len(secret_files) >= 9
    needles = []
    for path in secret_files:
        content = path.read_bytes()
        lines = content.splitlines()[1:-1] if content.startswith(b"-----BEGIN") else []
        needles += lines[1:] or [content, base64.b64encode(content), content.hex().encode()]
    logs = [*deployment.folder.rglob("*.log"), *deployment.folder.rglob("*.json*")]
    assert len(logs) >= 8
    seen = {str(path): path.read_bytes() for path in logs}
    for service in deployment.services:
        seen[service.name] = "\0".join(psutil.Process(service.pid).cmdline()).encode()
    assert not [name for name, text in seen.items() if any(needle in text for needle in needles)]
