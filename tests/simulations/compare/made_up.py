"""Comparisons whose runs are made up: what they measured is written where they would have written it."""

import json
from pathlib import Path

from bora_fl.simulations import grid
from bora_fl.simulations.compare.plan import CompareRun, Plan, plan


def lay_out(root: Path, base: dict | None = None, **changes) -> Plan:
    options = {
        "strategies": ["fedavg", "refactor"],
        "scenarios": ["dirichlet-1"],
        "methods": ["bora"],
        "seeds": 2,
        "clients": 4,
        "root": root,
        "threads": 1,
    }
    options = options | changes
    options["seeds"] = range(options["seeds"])
    return plan({"train.local-steps": 8, "run.num-rounds": 1} | (base or {}), **options)


def finish(
    run: CompareRun,
    accuracy: float,
    *,
    floor: float = 0.5,
    client_loss: float | None = 1.0,
    evaluated: str = "central",
) -> None:
    """Mark a run of one round as finished."""
    run.folder.mkdir(parents=True, exist_ok=True)
    common = {"loss": 1.0, "train_loss": 1.0, "client_accuracy": None, "client_accuracy_min": None, "per_client": {}}
    common |= {"bytes_up": 1, "bytes_down": 1, "seconds": 1.0, "server_seconds": 0.1, "clients": 4, "rejected": 0}
    common |= {"strategy": {}, "epsilon": None, "client_loss": client_loss, "evaluated": evaluated}
    rows = [common | {"round": 0, "accuracy": floor}, common | {"round": 1, "accuracy": accuracy}]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    end = {"identity": run.identity, "seconds": 10.0, "versions": {}, "result": {}}
    (run.folder / grid.FINISHED).write_text(json.dumps(end))
