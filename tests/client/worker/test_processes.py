"""A site's worker in two processes: as one process, and what becomes of a run when one of them is killed."""

import json
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from bora_fl.client.worker.address import Address, WorkerSettings
from bora_fl.client.worker.stub import status
from bora_fl.report import training_rows
from bora_fl.simulations.engine import simulate
from bora_fl.strategies.observer import RunFailedError
from tests.client.worker.in_process import eventually
from tests.client.worker.test_process import STARTUP, adapter, answers, nodes, worker
from tests.conftest import BAD, GOOD

TOLERANCE = 1e-5  # of the largest entry


@pytest.fixture
def site(tmp_path: Path) -> WorkerSettings:
    return WorkerSettings(Address(path=tmp_path / "private" / "worker.sock"), wait=STARTUP)


def causal(tiny_causal: Path, tmp_path: Path) -> dict[str, Any]:
    """A language model, prompts and responses of unequal lengths, two batches of three examples a step."""
    path = tmp_path / "prompts.jsonl"
    rows = [
        {
            "prompt": f"was the film {'very ' * (i % 5)}",
            "response": " ".join((GOOD + BAD)[: 1 + i % 7]),
            "domain": "abc"[i % 3],
        }
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model.name": str(tiny_causal),
        "model.task": "causal-lm",
        "model.max-length": 32,
        "adapter.target-modules": "q_proj,v_proj",
        "data.name": str(path),
        "train.batch-size": 3,
        "train.accumulation": 2,
        "train.optimizer-state": "kept",
    }


def test_two_processes_train_what_one_does(tiny_config, tiny_causal: Path, tmp_path: Path, site: WorkerSettings):
    short = tiny_config | {"run.num-rounds": 2}  # Adam makes of rounding, step by step, more than that
    configs = {
        "classifier": short | {"train.batch-size": 7},
        "language model": short | causal(tiny_causal, tmp_path),
    }
    with worker(site, "--processes", "2") as process:
        for name, config in configs.items():
            alone = simulate(config | {"run.output-dir": str(tmp_path / name)}, 3)
            there = simulate(config | {"run.output-dir": str(tmp_path / name / "2")}, 3, node_configs=nodes(site))
            ours, theirs = adapter(alone), adapter(there)
            assert ours.keys() == theirs.keys()
            for key, tensor in ours.items():
                assert torch.allclose(tensor, theirs[key], rtol=0, atol=TOLERANCE * float(tensor.abs().max())), key
            assert all(row["rejected"] == 0 for row in training_rows(there / "metrics.jsonl"))
            losses = [[row["train_loss"] for row in training_rows(f / "metrics.jsonl")] for f in (alone, there)]
            assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
        others = psutil.Process(process.pid).children()
        assert len(others) == 1
        assert others[0].cpu_times().user > 0
        process.terminate()
        assert process.wait(30) == 0
    assert eventually(lambda: not others[0].is_running())
    assert "2 processes train each client together" in (tmp_path / "worker.log").read_text()


@pytest.mark.parametrize(
    ("options", "refused", "why"),
    [
        ([], {"privacy.mode": "record", "strategy.weighting": "uniform"}, "start the worker with --processes 1"),
        (["--shard"], {"train.compile": True}, "train.compile = true with a sharded base"),
    ],
    ids=["whole", "shared-out"],
)
def test_a_killed_process_costs_the_round_and_the_next_starts_it_anew(
    options: list[str],
    refused: dict[str, Any],
    why: str,
    tiny_config,
    tiny_causal: Path,
    tmp_path: Path,
    site: WorkerSettings,
):
    """A base model that was shared out is loaded anew too."""
    config = tiny_config | (causal(tiny_causal, tmp_path) if options else {}) | {"run.num-rounds": 1}

    def run(name: str, **more: Any) -> dict[str, Any]:
        chosen = config | {"run.output-dir": str(tmp_path / name)} | more
        return training_rows(simulate(chosen, 3, node_configs=nodes(site)) / "metrics.jsonl")[-1]

    with worker(site, "--processes", "2", *options) as process:
        assert eventually(lambda: answers(site), STARTUP)

        def kill_another() -> None:
            if eventually(lambda: ": train " in status(site).current, STARTUP):
                psutil.Process(process.pid).children()[0].kill()

        killer = threading.Thread(target=kill_another)
        killer.start()
        long = {"train.local-steps": 100_000, "strategy.timeout": 20.0}
        with pytest.raises(RunFailedError) as failed:
            run("broken", **long)
        killer.join()
        assert "worker-unavailable" in str(failed.value)
        log = (tmp_path / "worker.log").read_text()
        assert "process 1 of this worker's 2 ended with code -9 while it trained" in log
        assert run("after")["rejected"] == 0
        with pytest.raises(RunFailedError, match="run-config-invalid"):
            run("refused", **refused)
        assert why in (tmp_path / "worker.log").read_text()
