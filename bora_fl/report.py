"""What happened in a round: the report, ``metrics.jsonl``, the table of rounds and their picture."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from rich.table import Table

from bora_fl.privacy.accounting import Unit, summarize


@dataclass
class RoundReport:
    """What happened in a round; one line of ``metrics.jsonl``.

    ``loss`` and ``accuracy`` are those of the merged adapter on the central test set (``evaluated`` is ``central``),
    or, in rounds without central evaluation, the clients' own on their held-out parts before training (``clients``).
    """

    round: int
    loss: float | None = None
    accuracy: float | None = None
    evaluated: str = ""
    train_loss: float | None = None
    client_loss: float | None = None
    client_accuracy: float | None = None
    client_accuracy_min: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    server_seconds: float = 0.0
    clients: int = 0
    rejected: int = 0
    reasons: dict[str, str] = field(default_factory=dict)
    epsilon: dict[str, float | str] | None = None
    strategy: dict[str, float] = field(default_factory=dict)
    per_client: dict[str, dict[str, float]] = field(default_factory=dict)

    def summarize_clients(self) -> None:
        """Fill in what follows from `per_client`: the training loss, ε, and the evaluation before training."""
        metrics = list(self.per_client.values())
        if metrics and all("train-loss" in m for m in metrics):
            self.train_loss = _mean([m["train-loss"] for m in metrics], [m["num-examples"] for m in metrics])
        for unit in get_args(Unit):
            key = f"epsilon-per-{unit}"
            if spent := {client: m[key] for client, m in self.per_client.items() if key in m}:
                self.epsilon = asdict(summarize(spent, unit))
        evaluated = [m for m in metrics if m.get("eval-examples")]
        if evaluated:
            self.summarize_evaluation(evaluated)

    def summarize_evaluation(self, metrics: list[dict[str, float]]) -> None:
        """Fill in the clients' mean loss and accuracy, weighted by examples, and the worst client's accuracy."""
        weights = [m.get("eval-examples", 0.0) for m in metrics]
        self.client_loss = _mean([m.get("eval-loss", 0.0) for m in metrics], weights)
        self.client_accuracy = _mean([m.get("eval-accuracy", 0.0) for m in metrics], weights)
        self.client_accuracy_min = min((m.get("eval-accuracy", 0.0) for m in metrics), default=None)


def _mean(values: list[float], weights: list[float]) -> float:
    total = sum(weights)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else 0.0


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON object as a line, on disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows; a last line cut off by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def drop_rows_after(path: Path, last_round: int) -> None:
    """Drop rows after a round, so that a resumed run writes each round once."""
    rows = [row for row in read_rows(path) if row["round"] <= last_round]
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(path)


def round_line(row: dict[str, Any], num_rounds: int) -> str:
    """A round in one line."""
    spent = row.get("epsilon")
    privacy = f", epsilon {spent['largest']:.3g} per {spent['unit']}" if spent else ""
    return (
        f"round {row['round']}/{num_rounds}: train loss {_number(row.get('train_loss'))}, "
        f"loss {_number(row.get('loss'))}, accuracy {_number(row.get('accuracy'))} "
        f"({row.get('evaluated') or 'not evaluated'}), {row['clients']} clients, {row['rejected']} rejected"
        f"{privacy}, {row['seconds']:.1f} s"
    )


def rounds_table(rows: list[dict[str, Any]], title: str) -> Table:
    """The table of rounds.

    ``train`` is the training loss; ``on`` says what loss and accuracy were measured on: the central test set, or the
    clients' held-out parts; ``ok`` and ``bad`` count the replies that were merged and set aside.
    """
    result = Table(title=title)
    for name in ("round", "train", "loss", "acc.", "on", "up MB", "down MB", "s", "ok", "bad"):
        result.add_column(name, justify="right")
    for row in rows:
        result.add_row(
            str(row["round"]),
            _number(row.get("train_loss")),
            _number(row.get("loss")),
            _number(row.get("accuracy")),
            row.get("evaluated") or "-",
            f"{row['bytes_up'] / 1e6:.2f}",
            f"{row['bytes_down'] / 1e6:.2f}",
            f"{row['seconds']:.1f}",
            str(row["clients"]),
            str(row["rejected"]),
        )
    return result


def rounds_picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw loss and accuracy over the rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    central = [row for row in rows if row.get("evaluated") == "central"]
    clients = [row for row in rows if row.get("client_accuracy") is not None]
    curves = (
        (losses, "train_loss", rows, "training, clients", ":"),
        (losses, "loss", central, "central test set", "-"),
        (accuracies, "client_accuracy", clients, "clients' held-out parts, before training", ":"),
        (accuracies, "accuracy", central, "central test set", "-"),
    )
    for axes, key, chosen, label, style in curves:
        points = [(row["round"], row[key]) for row in chosen if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=label)
    for axes, name in ((losses, "loss"), (accuracies, "accuracy")):
        axes.set_xlabel("round")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
