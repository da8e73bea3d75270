"""What a trained adapter loses as a LoRA of lower rank: `bora-fl bench compression RUN … [--ranks 4 8 16]`.

Each layer's update is formed densely and cut by an SVD in float64, which is what `bora-fl export --as lora --rank R`
finds on small cores, and the model is evaluated on the run's test examples with the cut update in its weights.
LoRA-Squeeze (arXiv:2602.10993) trains at a high rank and compresses so.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bora_fl.config import parse
from bora_fl.data import test_data
from bora_fl.evaluate import Metrics, evaluate
from bora_fl.exporting import load_run

DEFAULT = [1, 2, 4, 8, 16, 32]


def cut(update: torch.Tensor, rank: int) -> torch.Tensor:
    """The closest matrix of a rank."""
    left, values, right = torch.linalg.svd(update.double(), full_matrices=False)
    kept: torch.Tensor = (left[:, :rank] * values[:rank]) @ right[:rank]
    return kept.to(update.dtype)


def measured(folder: Path, ranks: Sequence[int]) -> list[tuple[str, float, Metrics]]:
    """A run's rows: what the layers' updates are, the error of it, and the metrics on the test examples."""
    run, tokenizer = load_run(folder)
    settings = parse(json.loads((folder / "config.json").read_text()))
    data = test_data(settings.data, settings.model, tokenizer)
    if data is None:
        raise SystemExit(f"{folder}: data.test-split is empty, so there is nothing to evaluate on")
    batch = settings.train.evaluation_batch_size
    rows = [("as trained", 0.0, evaluate(run.model, data, batch))]
    layers: list[Any] = [module for module in run.model.modules() if hasattr(module, "get_delta_weight")]
    with torch.no_grad():
        weights = [layer.get_base_layer().weight for layer in layers]
        frozen = [weight.clone() for weight in weights]
        updates = [layer.get_delta_weight("default") for layer in layers]
        merged = run.model.merge_and_unload()  # its head, and the weights in place
        size = sum(update.square().sum().item() for update in updates)
        for rank in ranks:
            lost = 0.0
            for weight, start, update in zip(weights, frozen, updates, strict=True):
                kept = cut(update, rank)
                lost += (update - kept).square().sum().item()
                weight.copy_(start + kept)
            rows.append((f"rank {rank}", (lost / size) ** 0.5 if size else 0.0, evaluate(merged, data, batch)))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table: means over the runs, and the mean difference from the adapter as it was trained."""
    parser = argparse.ArgumentParser(
        prog="bora-fl bench compression", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of finished runs of one model and adapter")
    parser.add_argument("--ranks", type=int, nargs="+", default=DEFAULT)
    options = parser.parse_args(arguments)
    tables = [measured(folder, options.ranks) for folder in options.runs]
    print(f"{len(tables)} runs\n{'update':<12} {'error':>7} {'accuracy %':>11} {'difference':>11} {'loss':>8}")
    whole = [table[0][2].accuracy for table in tables]
    for rows in zip(*tables, strict=True):
        accuracies = [metrics.accuracy for _, _, metrics in rows]
        differences = [100 * (a - b) for a, b in zip(accuracies, whole, strict=True)]
        error, loss = statistics.mean(row[1] for row in rows), statistics.mean(row[2].loss for row in rows)
        accuracy, difference = 100 * statistics.mean(accuracies), statistics.mean(differences)
        print(f"{rows[0][0]:<12} {error:>7.3f} {accuracy:>11.2f} {difference:>+11.2f} {loss:>8.4f}")


if __name__ == "__main__":
    main()
