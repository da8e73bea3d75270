"""`bora-fl worker` as a site starts it, with the real training: a whole federation through it, and its end."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bora_fl.client.worker.address import Address, WorkerSettings
from bora_fl.client.worker.stub import WorkerError, status
from bora_fl.report import training_rows
from bora_fl.simulations.engine import simulate
from bora_fl.strategies.observer import RunFailedError
from tests.client.worker.in_process import eventually

STARTUP = 240.0  # seconds; it takes a tenth of that on a machine with nothing else to do
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def site(tmp_path: Path) -> WorkerSettings:
    return WorkerSettings(Address(path=tmp_path / "private" / "worker.sock"), wait=STARTUP)


@contextmanager
def worker(site: WorkerSettings, *options: str) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "bora_fl.cli", "worker", "--listen", str(site.address), *options]
    log = site.address.path.parent.with_name("worker.log")
    with log.open("a") as out:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def nodes(site: WorkerSettings, wait: float = STARTUP) -> dict:
    return {partition: {"worker": str(site.address), "worker-wait": wait} for partition in range(3)}


def answers(site: WorkerSettings) -> bool:
    try:
        return status(WorkerSettings(site.address, wait=1.0)).pid > 0
    except (WorkerError, FileNotFoundError):
        return False


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_federation_through_a_worker_equals_one_without(tiny_config, tmp_path: Path, site: WorkerSettings):
    config = tiny_config | {"strategy.fraction-evaluate": 1.0, "strategy.name": "fedsa"}  # fedsa keeps factors local
    alone = simulate(config, 3)
    with worker(site, *[f"-c{key}={value}" for key, value in config.items()], "--partition", "0/3") as process:
        there = simulate(config | {"run.output-dir": str(tmp_path / "there")}, 3, node_configs=nodes(site))
        found = status(site)
        process.terminate()
        assert process.wait(30) == 0
    ours, theirs = adapter(alone), adapter(there)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (found.base_loads, found.data_loads) == (1, 1)
    assert (found.trained, found.evaluated, found.refused, found.cancelled) == (9, 9, 0, 0)
    assert not site.address.path.exists()
    log = (tmp_path / "worker.log").read_text()
    assert "round 3 train partition 2: train 4/4" in log
    assert log.rstrip().endswith("stopped")


def test_a_killed_worker_is_named_and_its_successor_knows_the_ledger(
    tiny_config, tmp_path: Path, site: WorkerSettings, caplog: pytest.LogCaptureFixture
):
    config = tiny_config | {
        "privacy.mode": "record",
        "privacy.noise-multiplier": 20.0,
        "privacy.epsilon": 1e6,
        "privacy.accountant": "rdp",
        "privacy.ledger-dir": str(tmp_path / "ledger"),
        "strategy.name": "ffa",
        "strategy.weighting": "uniform",
        "run.num-rounds": 1,
    }

    def run(name: str, steps: int) -> dict:
        chosen = config | {"run.output-dir": str(tmp_path / name), "train.local-steps": steps}
        return training_rows(simulate(chosen, 3, node_configs=nodes(site, wait=1.0)) / "metrics.jsonl")[-1]

    def booked() -> list[list[int]]:
        ledgers = [json.loads(file.read_text()) for file in (tmp_path / "ledger").glob("*.json")]
        return sorted([entry["steps"] for entry in ledger["entries"]] for ledger in ledgers)

    with worker(site) as process:
        assert eventually(lambda: answers(site), STARTUP)
        assert run("before", 4)["rejected"] == 0

        def kill_at_work() -> None:
            if eventually(lambda: ": train " in status(site).current, STARTUP):
                process.kill()

        killer = threading.Thread(target=kill_at_work)
        killer.start()
        with pytest.raises(RunFailedError) as failed:
            run("broken", 100_000)
        killer.join()
    # A reason is under its node, and node 2 serves partition 0.
    assert "2: worker-unavailable" in str(failed.value)
    assert "3: worker-unavailable" in str(failed.value)
    assert f"the site worker at {site.address} ended while it worked on this" in caplog.text
    assert f"the site worker at {site.address} cannot be reached" in caplog.text
    with worker(site):
        assert eventually(lambda: answers(site), STARTUP)
        after = run("after", 4)
        assert status(site).trained == 3
    assert after["rejected"] == 0
    assert booked() == [[4, 4], [4, 4], [4, 100_000, 4]]
