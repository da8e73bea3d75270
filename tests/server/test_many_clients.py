"""A hundred clients, ten a round: memory must not grow with the rounds, nor with the clients that have taken part."""

import psutil

from bora_fl.report import training_rows
from bora_fl.simulations.engine import simulate


def test_memory_stays_flat_over_rounds_and_clients(tiny_config):
    resident: list[int] = []

    def watch(message, partition):
        resident.append(psutil.Process().memory_info().rss)
        return message

    config = tiny_config | {
        "data.partition": "iid",
        "data.evaluation-fraction": 0.0,
        "strategy.fraction-train": 0.1,
        "strategy.evaluate-in-train": False,
        "train.local-steps": 1,
        "run.num-rounds": 24,
        "run.evaluate-every": 24,
    }
    rows = training_rows(simulate(config, 100, tamper=watch) / "metrics.jsonl")
    assert [row["clients"] for row in rows] == [10] * 24
    assert len({client for row in rows for client in row["per_client"]}) > 85
    warm, end = resident[59], max(resident[-20:])  # after six rounds and at the end
    assert end - warm < 25e6
