"""A site's worker whose two processes share the base model out: as one process does."""

import json
import re
from pathlib import Path

import pytest
import torch

from bora_fl.client.worker.address import Address, WorkerSettings
from bora_fl.report import training_rows
from bora_fl.simulations.engine import simulate
from tests.client.worker.test_process import STARTUP, adapter, nodes, worker
from tests.client.worker.test_processes import TOLERANCE, causal
from tests.conftest import BAD, GOOD

HOLDS = re.compile(r"(process 1: )?this process holds ([\d.]+) of ([\d.]+) MB of the base model")


@pytest.fixture
def site(tmp_path: Path) -> WorkerSettings:
    return WorkerSettings(Address(path=tmp_path / "private" / "worker.sock"), wait=STARTUP)


def same(alone: Path, there: Path) -> None:
    ours, theirs = adapter(alone), adapter(there)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.allclose(tensor, theirs[key], rtol=0, atol=TOLERANCE * float(tensor.abs().max())), key
    rows = [training_rows(folder / "metrics.jsonl") for folder in (alone, there)]
    assert all(row["rejected"] == 0 for row in rows[1])
    for name in ("train_loss", "client_loss"):
        assert [row[name] for row in rows[0]] == pytest.approx([row[name] for row in rows[1]], rel=TOLERANCE)


def test_two_processes_with_half_of_the_base_each_train_what_one_does(
    tiny_config, tiny_causal: Path, tmp_path: Path, site: WorkerSettings
):
    short = tiny_config | {"run.num-rounds": 2}
    language = short | causal(tiny_causal, tmp_path) | {"strategy.name": "refactor"}
    pairs = tmp_path / "pairs.jsonl"
    sides = [{"chosen": " ".join(GOOD[: 1 + i % 4]), "rejected": BAD[i % 3]} for i in range(60)]
    pairs.write_text(
        "".join(
            json.dumps({"prompt": "was the film", "domain": "abc"[i % 3], **side}) + "\n"
            for i, side in enumerate(sides)
        )
    )
    configs = {
        "one row a batch, so that one process is idle": language | {"train.batch-size": 1},
        "folds into a part of the weights": language | {"train.checkpointing": True, "strategy.residual": "fold"},
        "random head of a classifier": short
        | {"train.batch-size": 7, "strategy.fraction-evaluate": 1.0, "strategy.name": "refactor"},
        "solved head of a classifier": short | {"run.num-rounds": 0, "head.init": "closed-form"},
        "pairs against a reference": language | {"data.name": str(pairs), "data.format": "preference"},
    }
    ranks = {0: {"rank": 1}}  # another rank than its neighbours' in the same process
    with worker(
        site, "--processes", "2", "--shard", "--warm-up", *[f"-c{k}={v}" for k, v in language.items()]
    ) as process:
        for name, config in configs.items():
            folder = tmp_path / name.partition(" ")[0]
            there = {node: known | ranks.get(node, {}) for node, known in nodes(site).items()}
            same(
                simulate(config | {"run.output-dir": str(folder / "1")}, 3, node_configs=ranks),
                simulate(config | {"run.output-dir": str(folder / "2")}, 3, node_configs=there),
            )
        process.terminate()
        assert process.wait(30) == 0
    held = HOLDS.findall((tmp_path / "worker.log").read_text())
    assert {process for process, _, _ in held} == {"", "process 1: "}
    assert all(0.45 < float(here) / float(whole) < 0.55 for _, here, whole in held)
