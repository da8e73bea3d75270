"""The page of a run, from what lies in its folder; of a run that goes on, what it has so far."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bora_fl.config import ConfigError, Settings, read_config
from bora_fl.page import html
from bora_fl.page.charts import Points, line_chart
from bora_fl.report import num_unreadable, read_rows
from bora_fl.server.samples import SAMPLES
from bora_fl.wire.refusals import Code

Row = Mapping[str, Any]
_CLIENT_COLUMNS = (
    *("partition", "rank", "num-examples", "train-loss", "eval-loss", "eval-accuracy", "eval-examples"),
    *("train-seconds", "steps", "noise-multiplier", "epsilon-per-record", "epsilon-per-client"),
)


_NUMBERS = ("clients", "rejected", "bytes_up", "bytes_down", "seconds")  # of every round


def run_page(folder: Path) -> str:
    """Write the page of a run.

    Args:
        folder: The run's output folder.

    Raises:
        ConfigError: If it holds no run, or one whose files are damaged.
    """
    path = folder / "metrics.jsonl"
    rows = read_rows(path)
    if not rows or not (folder / "config.json").is_file():
        raise ConfigError(
            f"RUN {folder}: there is no config.json with a metrics.jsonl; name the output folder of a run that has "
            "ended a round"
        )
    config = Settings().flat() | read_config(folder)
    whole = [row for row in rows if all(isinstance(row.get(key), int | float) for key in _NUMBERS)]
    try:
        return _page(folder, whole, config, num_unreadable(path) + len(rows) - len(whole))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"RUN {folder}: metrics.jsonl, samples.jsonl or config.json is damaged ({reason}); restore it from a backup"
        ) from error


def _page(folder: Path, rows: Sequence[Row], config: Row, unreadable: int) -> str:
    parts = [
        html.heading(folder.name, 1),
        html.note(
            f"{config['strategy.name']} on {config['model.name']}, {config['adapter.method']} of rank "
            f"{config['adapter.rank']}, data {config['data.name']}"
        ),
        html.note(f"{unreadable} lines of metrics.jsonl are no rounds and left out.") if unreadable else "",
        _summary(rows, config),
        html.heading("Rounds"),
        _charts(rows),
        _rounds(rows),
        _samples(folder / SAMPLES),
        html.heading("Clients"),
        _clients(rows),
        html.png(folder / "partition.png", "examples of each class at each client"),
        html.heading("Privacy"),
        _privacy(rows, config),
        html.heading("Rejected replies"),
        _rejected(rows),
        html.heading("Settings"),
        html.note("Bold: not the default."),
        _settings(config),
    ]
    versions = folder / "versions.json"
    if versions.is_file():
        parts += [html.heading("Versions"), _versions(versions)]
    return html.document(f"{folder.name}, a run of bora-fl", [part for part in parts if part])


def _versions(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf8"))
        return html.table(["what", "version"], [[key, str(value)] for key, value in found.items()])
    except (ValueError, AttributeError):
        return html.note(f"{path.name} cannot be read.")


def _summary(rows: Sequence[Row], config: Row) -> str:
    last = rows[-1]
    values = {
        "round": f"{last['round']} of {config['run.num-rounds']}",
        "accuracy": number(next((r["accuracy"] for r in reversed(rows) if r.get("accuracy") is not None), None)),
        "loss": number(next((r["loss"] for r in reversed(rows) if r.get("loss") is not None), None)),
        "clients in the last round": str(last["clients"]),
        "rejected in all": str(sum(row["rejected"] for row in rows)),
        "MB up and down": f"{sum(row['bytes_up'] + row['bytes_down'] for row in rows) / 1e6:.2f}",
        "seconds": f"{sum(row['seconds'] for row in rows):.1f}",
    }
    for key, name in (
        ("perplexity", "perplexity"),
        ("margin", "reward margin"),
        ("f1", "F1 of entities"),
        ("general_loss", "loss, general text"),
    ):
        found = [row[key] for row in rows if row.get(key) is not None]
        if found:
            values[f"{name}, first and last"] = f"{number(found[0])}, {number(found[-1])}"
    if spent := _spent(rows):
        values[f"epsilon per {spent['unit']}, the largest"] = f"{spent['largest']:.4g}"
    return html.facts(values)


def _charts(rows: Sequence[Row]) -> str:
    central = [row for row in rows if row.get("evaluated") == "central"]
    spent = [row | {"spent": row["epsilon"]["largest"]} for row in map(dict, rows) if row.get("epsilon")]
    trained = [row | {"megabytes": (row["bytes_up"] + row["bytes_down"]) / 1e6} for row in map(dict, rows)]
    charts = [
        line_chart(
            "loss",
            {
                "training": _points(rows, "train_loss"),
                "clients' held-out parts": _points(rows, "client_loss"),
                "central test set": _points(central, "loss"),
                "general text": _points(rows, "general_loss"),
            },
        ),
        line_chart(
            "accuracy",
            {
                "clients' held-out parts": _points(rows, "client_accuracy"),
                "worst client": _points(rows, "client_accuracy_min"),
                "central test set": _points(central, "accuracy"),
            },
        ),
        line_chart("seconds", {"round": _points(rows, "seconds"), "server": _points(rows, "server_seconds")}),
        line_chart("MB up and down", {"all clients": _points(trained, "megabytes")}),
        line_chart("epsilon spent", {"largest of the clients": _points(spent, "spent")}),
    ]
    return f"<div class=charts>{''.join(charts)}</div>"


def _points(rows: Sequence[Row], key: str) -> Points:
    return [(row["round"], row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]


def _rounds(rows: Sequence[Row]) -> str:
    keys = ("train_loss", "loss", "accuracy", "client_loss", "client_accuracy", "client_accuracy_min")
    header = ["round", *(key.replace("_", " ") for key in keys), "measured", "head", "merge error", "clients"]
    header += ["rejected", "seconds"]
    cells = [
        [
            str(row["round"]),
            *(number(row.get(key)) for key in keys),
            row.get("evaluated") or "-",
            row.get("head") or "-",
            number(row.get("strategy", {}).get("merge_error")),
            str(row["clients"]),
            str(row["rejected"]),
            f"{row['seconds']:.1f}",
        ]
        for row in rows
    ]
    return html.table(header, cells)


def _samples(path: Path) -> str:
    """What a language model wrote in the last round with samples, beside what it wrote for the same in the first."""
    found = read_rows(path)
    if not found:
        return ""
    first, last = found[0], found[-1]
    header = ["prompt", "reference", f"round {first['round']}", f"round {last['round']}", "ROUGE-L"]
    before = {json.dumps(sample["prompt"]): sample["response"] for sample in first["samples"]}
    cells = [
        [
            _asked(sample["prompt"]),
            sample["reference"],
            before.get(json.dumps(sample["prompt"]), "-"),
            sample["response"],
            number(sample["rouge_l"]),
        ]
        for sample in last["samples"]
    ]
    return html.heading("Samples") + html.table(header, cells, text=header[:4])


def _asked(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m.get('content', '')}" for m in prompt)


def _clients(rows: Sequence[Row]) -> str:
    """What each client reported last, and of how many rounds it was part."""
    latest: dict[str, dict[str, float]] = {}
    rounds: dict[str, int] = {}
    for row in rows:
        for client, metrics in row.get("per_client", {}).items():
            latest[client] = latest.get(client, {}) | metrics
            rounds[client] = rounds.get(client, 0) + 1
    if not latest:
        return html.note("No client has reported a number.")
    shown = [name for name in _CLIENT_COLUMNS if any(name in metrics for metrics in latest.values())]
    cells = [
        [client, str(rounds[client]), *(number(metrics.get(name)) for name in shown)]
        for client, metrics in sorted(latest.items(), key=lambda item: int(item[0]))
    ]
    return html.table(["client", "rounds", *(name.replace("-", " ") for name in shown)], cells)


def _spent(rows: Sequence[Row]) -> Row | None:
    return next((row["epsilon"] for row in reversed(rows) if row.get("epsilon")), None)


def _privacy(rows: Sequence[Row], config: Row) -> str:
    if config["privacy.mode"] == "none":
        masked = "; the updates are masked by secure aggregation" if config["privacy.secure-aggregation"] else ""
        return html.note(f"privacy.mode is none: no differential privacy{masked}.")
    spent = _spent(rows)
    budget = f"budget {config['privacy.epsilon']:g} at delta {config['privacy.delta']:g}"
    if spent is None:
        return html.note(f"privacy.mode is {config['privacy.mode']}; {budget}; nobody has reported what is spent.")
    values = {
        f"largest epsilon per {spent['unit']}": number(spent["largest"]),
        "median": number(spent["median"]),
        "smallest": number(spent["smallest"]),
        "who report it": str(spent["clients"]),
    }
    return html.facts(values) + html.note(f"privacy.mode is {config['privacy.mode']}; {budget}.")


def _rejected(rows: Sequence[Row]) -> str:
    cells = []
    for row in rows:
        for who, why in row.get("reasons", {}).items():
            code, _, rest = why.partition(": ")
            known = Code.of(code) is not None
            cells.append([str(row["round"]), who, code if known else "-", rest if known else why])
    if not cells:
        return html.note("None.")
    return html.table(["round", "who", "code", "reason"], cells, text=["reason"])


def _settings(config: Row) -> str:
    defaults = Settings().flat()
    cells = [
        [key, str(value) if defaults.get(key) == value else f"**{value}**", str(defaults.get(key, "-"))]
        for key, value in config.items()
    ]
    return html.table(["setting", "value", "default"], cells, text=["value"])


def number(value: float | None) -> str:
    """A number in a table."""
    if value is None:
        return "-"
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"
