"""The same simulation on a Ray cluster of two nodes, and on a Ray of its own."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from bora_fl.report import training_rows
from bora_fl.simulations.engine import simulate

ROOT = Path(__file__).resolve().parents[2]
# Which nodes of the cluster ran Flower's client actors.
ASK = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
from ray._private.state import actors
found = actors().values()
print(len({a["Address"]["NodeID"] for a in found if "ClientAppActor" in str(a)}))
"""


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes with a core each."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        nodes.add_node(num_cpus=1)
        yield nodes.address
    finally:
        nodes.shutdown()


@pytest.mark.deployment
@pytest.mark.filterwarnings("ignore")
def test_two_ray_nodes_give_the_adapter_of_one_process(cluster: str, tiny_config, tmp_path: Path):
    single = simulate(tiny_config, 3)
    folder = tmp_path / "cluster"
    config = tiny_config | {"run.output-dir": str(folder), "strategy.min-nodes": 3}
    options = [word for key, value in config.items() for word in ("-c", f"{key}={value}")]
    command = [sys.executable, "-m", "bora_fl.cli", "run", "--simulate", "3", "--app", str(ROOT), *options]
    environment = os.environ | {"RAY_ADDRESS": cluster}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    nodes = subprocess.run([sys.executable, "-c", ASK, cluster], capture_output=True, text=True, check=True)
    assert nodes.stdout.split()[-1] == "2"
    assert [row["clients"] for row in training_rows(folder / "metrics.jsonl")] == [3, 3, 3]
    adapters = [load_file(path / "adapter" / "adapter_model.safetensors") for path in (single, folder)]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=1e-5, atol=1e-6)


STRANGER = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print(ray.get(ray.remote(lambda: "obeyed").remote()))
"""


@pytest.mark.deployment
def test_a_ray_of_its_own_obeys_no_stranger_and_ends_with_its_launcher(tiny_config, tmp_path: Path):
    folder = tmp_path / "run"
    config = tiny_config | {"run.output-dir": str(folder), "run.num-rounds": 500}
    options = [word for key, value in config.items() for word in ("-c", f"{key}={value}")]
    command = [sys.executable, "-m", "bora_fl.cli", "run", "--simulate", "2", "--backend", "ray", "--app", str(ROOT)]
    with subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as launcher:
        try:
            deadline = time.monotonic() + 300
            while not training_rows(folder / "metrics.jsonl"):
                assert time.monotonic() < deadline
                assert launcher.poll() is None
                time.sleep(0.2)
            processes = psutil.Process(launcher.pid).children(recursive=True)
            lines = [" ".join(process.cmdline()) for process in processes]
            address = next(found[1] for line in lines if (found := re.search(r"--gcs-address=(\S+)", line)))
            stranger = {**os.environ, "RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)}
            asked = [sys.executable, "-c", STRANGER, address]
            answer = subprocess.run(asked, env=stranger, capture_output=True, text=True, timeout=120, check=False)
            assert answer.returncode != 0
            assert "obeyed" not in answer.stdout
        finally:
            launcher.kill()
    deadline = time.monotonic() + 10
    while [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
