"""A site's process is killed in the middle of a private round; what was noised is in the ledger of the next one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bora_fl.privacy.accounting import Budget, Spent, epsilon
from bora_fl.privacy.ledger import Ledger

DELTA, NOISE, STEPS, BUDGET = 1e-2, 1.0, 10, 20.0
PREAMBLE = """
import json, os, signal, sys
sys.path.insert(0, {tests!r})
import torch
from toy_model import Toy, collate, losses, make_records
from bora_fl.privacy.accounting import Budget
from bora_fl.client.dpsgd import train_privately
from bora_fl.privacy.ledger import Ledger

folder, when = sys.argv[1], sys.argv[2]
model, records = Toy(), make_records(40)
budget = Budget({budget}, {delta})
ledger = Ledger.open(folder, run_id="run", dataset_fingerprint="data", budget=budget, accountant="rdp")
taken = 0

class Counted(torch.optim.SGD):
    def step(self):
        global taken
        super().step()
        taken += 1
        with open(os.path.join(folder, "taken"), "a") as file:
            file.write("x")
        if when == "training" and taken == 4:
            os.kill(os.getpid(), signal.SIGKILL)

def spend(*entry):
    ledger.spend(*entry)
    if when == "before":
        os.kill(os.getpid(), signal.SIGKILL)

train_privately(
    model, losses, records, collate, Counted([p for p in model.parameters() if p.requires_grad], lr=0.1), clip_norm=1.0,
    noise_multiplier={noise}, expected_batch_size=10, physical_batch_size=10, steps={steps}, spend=spend,
)
if when == "after":  # the steps are taken, the reply has not left
    os.kill(os.getpid(), signal.SIGKILL)
"""


def train_in_a_process(folder: Path, when: str) -> int:
    code = PREAMBLE.format(tests=str(Path(__file__).parent), budget=BUDGET, delta=DELTA, noise=NOISE, steps=STEPS)
    return subprocess.run([sys.executable, "-c", code, str(folder), when], check=False, timeout=300).returncode


def taken(folder: Path) -> int:
    return len((folder / "taken").read_text()) if (folder / "taken").exists() else 0


@pytest.mark.parametrize(("when", "steps"), [("before", 0), ("training", 4), ("after", STEPS)])
def test_no_noised_step_is_lost_when_the_process_is_killed(when: str, steps: int, tmp_path: Path):
    assert train_in_a_process(tmp_path, when) == -signal.SIGKILL
    assert taken(tmp_path) == steps
    ledger = Ledger.open(
        tmp_path, run_id="run", dataset_fingerprint="data", budget=Budget(BUDGET, DELTA), accountant="rdp"
    )
    assert ledger.history() == [Spent(NOISE, 0.25, STEPS)]
    assert train_in_a_process(tmp_path, "never") == 0
    assert taken(tmp_path) == steps + STEPS
    assert ledger.epsilon() == epsilon([(NOISE, 0.25, 2 * STEPS)], DELTA, "rdp")
    assert ledger.epsilon() >= epsilon([(NOISE, 0.25, taken(tmp_path))], DELTA, "rdp")
    assert len(json.loads((tmp_path / "data.json").read_text())["entries"]) == 2
    assert not os.path.exists(tmp_path / "data.new")
