"""What a run writes for people and programs: ``metrics.jsonl`` and the table of rounds."""

import json
import os
from pathlib import Path
from typing import Any

from rich.table import Table


def append(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON object as a line, on disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """All rows; a last line cut off by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def cut(path: Path, last_round: int) -> None:
    """Drop rows after a round, so that a resumed run writes each round once."""
    rows = [row for row in read(path) if row["round"] <= last_round]
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(path)


def line(row: dict[str, Any], num_rounds: int) -> str:
    """A round in one line."""
    spent = row.get("epsilon")
    privacy = f", epsilon {spent['largest']:.3g} per {spent['unit']}" if spent else ""
    return (
        f"round {row['round']}/{num_rounds}: train loss {_number(row.get('train_loss'))}, "
        f"loss {_number(row.get('loss'))}, accuracy {_number(row.get('accuracy'))} "
        f"({row.get('evaluated') or 'not evaluated'}), {row['clients']} clients, {row['rejected']} rejected"
        f"{privacy}, {row['seconds']:.1f} s"
    )


def table(rows: list[dict[str, Any]], title: str) -> Table:
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


def picture(rows: list[dict[str, Any]], path: Path) -> None:
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
