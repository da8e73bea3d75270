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
    return (
        f"round {row['round']}/{num_rounds}: train loss {_number(row.get('train_loss'))}, "
        f"loss {_number(row.get('loss'))}, accuracy {_number(row.get('accuracy'))} "
        f"({row.get('evaluated') or 'not evaluated'}), {row['clients']} clients, {row['rejected']} rejected, "
        f"{row['seconds']:.1f} s"
    )


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """The table of rounds.

    ``on`` says what loss and accuracy were measured on: the central test set, or the clients' held-out parts.
    """
    result = Table(title=title)
    for name in ("round", "train loss", "loss", "accuracy", "on", "up MB", "down MB", "s", "clients", "bad"):
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


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
