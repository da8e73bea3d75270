"""The same simulation on a Ray cluster of two nodes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bora_fl.report import read_rows
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
    assert [row["clients"] for row in read_rows(folder / "metrics.jsonl")] == [3, 3, 3]
    adapters = [load_file(path / "adapter" / "adapter_model.safetensors") for path in (single, folder)]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=1e-5, atol=1e-6)
