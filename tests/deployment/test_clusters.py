"""Manifests for Kubernetes against its schemas and against compose.yaml, and the script for Slurm with a stand-in."""

import re
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SERVICES = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
MANIFESTS = {
    path.stem: list(yaml.safe_load_all(path.read_text())) for path in (ROOT / "deploy" / "kubernetes").glob("*.yaml")
}
SLURM = ROOT / "deploy" / "slurm" / "simulate.sbatch"
STAND_IN = """#!/bin/bash
echo "$@" > "$TOLD"
[ -z "${WAIT:-}" ] || { trap 'echo ended >> "$TOLD"; exit 3' TERM; touch "$TOLD.ready"; while :; do sleep 0.05; done; }
"""


def pod(place: str) -> dict:
    (found,) = (document for document in MANIFESTS[place] if document["kind"] == "StatefulSet")
    return found["spec"]["template"]["spec"]


def test_there_are_manifests_of_the_server_and_of_a_site():
    assert MANIFESTS.keys() == {"server", "site"}
    everything = {container["name"] for place in MANIFESTS for container in pod(place)["containers"]}
    assert everything == SERVICES.keys() - {"control"}  # the operators' door, which the page says how to add


@pytest.mark.parametrize("place", MANIFESTS)
def test_kubernetes_knows_the_manifests(place: str):
    for document in MANIFESTS[place]:
        kubernetes_validate.validate(document, "1.37", strict=True)


@pytest.mark.parametrize("place", MANIFESTS)
def test_containers_are_those_of_compose(place: str):
    volumes = {volume["name"]: volume for volume in pod(place)["volumes"]}
    for container in pod(place)["containers"]:
        service = SERVICES[container["name"]]
        command = [re.sub(r"\$\{NODE_CONFIG:-(.*)\}$", r"\1", word) for word in service["command"]]
        assert (container["image"], container["command"]) == (service["image"], command)
        environment = {row["name"]: row["value"] for row in container.get("env", ())}
        assert environment == service.get("environment", {})
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        sources = volumes[mounts["/run/secrets"]]["projected"]["sources"]
        parts = [next(iter(source.values())) for source in sources]
        assert {item["path"] for part in parts for item in part["items"]} == set(service["secrets"])
        assert {part["name"] for part in parts} <= {f"bora-fl-{place}", "bora-fl-nginx"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        writes = {"/run/proxy"} if service["image"].startswith("nginx") else {"/var/lib/bora-fl"}
        assert writes <= mounts.keys()
        assert set(mounts.values()) <= volumes.keys()


def test_one_port_is_open_and_pods_are_not_root():
    for place in MANIFESTS:
        assert pod(place)["securityContext"]["runAsNonRoot"] is True
        assert pod(place)["automountServiceAccountToken"] is False
        ports = [port["containerPort"] for row in pod(place)["containers"] for port in row.get("ports", ())]
        (policy,) = (document["spec"] for document in MANIFESTS[place] if document["kind"] == "NetworkPolicy")
        assert ports == [port["port"] for rule in policy["ingress"] for port in rule["ports"]]
        assert ports == ([8443] if place == "server" else [])
        selector = MANIFESTS[place][-2]["spec"]["selector"]["matchLabels"]
        assert policy["podSelector"]["matchLabels"] == selector


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stand-in of `bora-fl` writes what it was told."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "bora-fl").write_text(STAND_IN)
    (tmp_path / "bin" / "bora-fl").chmod(0o755)
    (tmp_path / "bin" / "activate").write_text(f'PATH="{tmp_path}/bin:$PATH"\n')
    monkeypatch.setenv("VENV", str(tmp_path))
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    return tmp_path / "told"


def test_the_slurm_script_gives_bora_fl_options_that_it_has(script: Path, monkeypatch: pytest.MonkeyPatch):
    from typer.main import get_command

    from bora_fl.cli import cli
    from bora_fl.config import overrides, parse

    monkeypatch.setenv("CLIENTS", "7")
    subprocess.run(["bash", str(SLURM), "-c", "run.seed=3"], check=True)
    told = script.read_text().split()
    assert told[0] == "run"
    run = get_command(cli).commands["run"].make_context("run", told[1:])
    assert (run.params["simulate"], run.params["cpus"], run.params["gpus"]) == (7, 1, 0.0)
    settings = parse(overrides(run.params["run_config"]))
    assert (settings.run.resume, settings.run.seed, settings.run.output_dir) == (True, 3, "runs/slurm")


def test_the_slurm_script_passes_the_signal_on_and_has_the_run_s_exit_code(script: Path, monkeypatch):
    import time

    monkeypatch.setenv("WAIT", "1")
    process = subprocess.Popen(["bash", str(SLURM)])
    while not script.with_name("told.ready").exists():
        time.sleep(0.02)
    process.terminate()
    assert process.wait(20) == 3
    assert script.read_text().splitlines()[-1] == "ended"
