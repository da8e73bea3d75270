"""What happened in a round: the report, ``metrics.jsonl``, the table of rounds and their picture."""

import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.table import Table

from bora_fl.paths import write_atomically
from bora_fl.privacy.accounting import EpsilonSummary, Unit, summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClientMetrics:
    """What a client reports of a round; None is what it does not report.

    Attributes:
        partition: The partition it serves.
        rank: The rank it trained at.
        num_examples: Its training examples.
        train_loss: Mean loss over the round's steps.
        steps: Optimizer steps.
        train_seconds: Duration of training.
        eval_loss: Loss of what it received, on its held-out part.
        eval_accuracy: Accuracy of the same.
        eval_examples: Size of its held-out part.
        epsilon_per_record: What it has spent on its data set, per record.
        epsilon_per_client: The same, per client.
        noise_multiplier: Noise of the round, in multiples of the clipping norm.
    """

    partition: float | None = None
    rank: float | None = None
    num_examples: float | None = None
    train_loss: float | None = None
    steps: float | None = None
    train_seconds: float | None = None
    eval_loss: float | None = None
    eval_accuracy: float | None = None
    eval_examples: float | None = None
    epsilon_per_record: float | None = None
    epsilon_per_client: float | None = None
    noise_multiplier: float | None = None

    @classmethod
    def read(cls, metrics: Mapping[str, float]) -> "ClientMetrics":
        """From the metrics of a reply, by their names on the wire; unknown ones are left out."""
        return cls(**{name: metrics[_wire(name)] for name in cls.__dataclass_fields__ if _wire(name) in metrics})

    def row(self) -> dict[str, float]:
        """As in ``metrics.jsonl``: what was reported, by its name on the wire."""
        return {_wire(name): value for name, value in asdict(self).items() if value is not None}

    def joined(self, other: "ClientMetrics") -> "ClientMetrics":
        """This and what `other` reports; `other` where both do."""
        return replace(self, **{name: value for name, value in asdict(other).items() if value is not None})


def _wire(name: str) -> str:
    return name.replace("_", "-")


@dataclass(frozen=True)
class Evaluation:
    """Clients' evaluation on their held-out parts.

    Attributes:
        loss: Mean, weighted by held-out examples.
        accuracy: The same of the accuracy.
        worst: The worst client's accuracy.
    """

    loss: float
    accuracy: float
    worst: float

    @classmethod
    def of(cls, metrics: Iterable[ClientMetrics]) -> "Evaluation | None":
        """The summary of those clients that evaluated; None if there is none."""
        found = [m for m in metrics if m.eval_examples]
        if not found:
            return None
        weights = [m.eval_examples or 0.0 for m in found]
        accuracies = [m.eval_accuracy or 0.0 for m in found]
        return cls(_mean([m.eval_loss or 0.0 for m in found], weights), _mean(accuracies, weights), min(accuracies))


@dataclass(frozen=True)
class RoundReport:
    """What happened in a round; one line of ``metrics.jsonl``. Round 0 is what training starts from.

    ``loss`` and ``accuracy`` are those of the merged adapter on the central test set (``evaluated`` is ``central``),
    or, in rounds without central evaluation, the clients' own on their held-out parts (``clients``): of what they were
    sent to train from, or of the round's result where they evaluate that too.
    ``perplexity`` is that of a language model's loss. Of preference pairs, ``loss`` is DPO's, ``accuracy`` the share
    whose chosen response has the larger reward, and ``margin`` the mean margin between the rewards. ``f1`` is that of
    the entities of the central test set, where words' classes are those of entities. ``general_loss`` is the loss on
    ``data.general-text``. ``effective_rank`` is the mean over layers of how many directions the adapter's
    update uses, in rounds with central evaluation. ``generation``
    holds the means of ``exact_match``, ``rouge_l`` and ``valid`` over ``examples`` held-out prompts. ``head`` names the
    classification head that was kept, where it was solved: ``trained``, ``solved``, ``x0.5`` (the solved one with its
    logits scaled) or ``mean x0.5`` (of this and the trained one). ``kept`` is set in the last round where
    ``run.keep-best`` has gone back to an earlier one's adapter: it names that round.
    """

    round: int
    loss: float | None = None
    accuracy: float | None = None
    evaluated: str = ""
    head: str = ""
    kept: int | None = None
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
    reasons: Mapping[str, str] = field(default_factory=dict)
    epsilon: EpsilonSummary | None = None
    strategy: Mapping[str, float] = field(default_factory=dict)
    effective_rank: float | None = None
    perplexity: float | None = None
    margin: float | None = None
    f1: float | None = None
    general_loss: float | None = None
    generation: Mapping[str, float] = field(default_factory=dict)
    per_client: Mapping[int, ClientMetrics] = field(default_factory=dict)
    replies: Mapping[str, str] = field(default_factory=dict)
    """Node, and the question if it was not to train, to the digest of its reply: for the audit log alone."""

    def row(self) -> dict[str, Any]:
        """As a line of ``metrics.jsonl``."""
        per_client = {str(client): metrics.row() for client, metrics in self.per_client.items()}
        row = asdict(replace(self, per_client={})) | {"per_client": per_client}
        del row["replies"]
        return row


def mean_train_loss(metrics: Collection[ClientMetrics]) -> float | None:
    """The clients' mean training loss, weighted by examples; None if one of them does not report it."""
    losses = [m.train_loss for m in metrics if m.train_loss is not None]
    if not losses or len(losses) < len(metrics):
        return None
    return _mean(losses, [m.num_examples or 0.0 for m in metrics])


def epsilon_of(metrics: Mapping[int, ClientMetrics]) -> EpsilonSummary | None:
    """The largest ε and its distribution over the clients that report one."""
    for unit in get_args(Unit):
        spent = {client: getattr(m, f"epsilon_per_{unit}") for client, m in metrics.items()}
        if known := {client: value for client, value in spent.items() if value is not None}:
            return summarize(known, unit)
    return None


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    total = sum(weights)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else 0.0


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON object as a line, on disk when this returns; the file is its owner's alone.

    A line that a crash has cut off is ended first, so that it spoils no other.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "ab") as file:
        os.fchmod(descriptor, 0o600)
        size = os.fstat(descriptor).st_size
        cut_off = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        file.write(b"\n" * cut_off + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(descriptor)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that can be read, one a round: of a round that was written twice, the last."""
    return _read(path)[0]


def num_unreadable(path: Path) -> int:
    """How many lines are no rows."""
    return len(_read(path)[1])


def drop_rows_after(path: Path, last_round: int) -> None:
    """Drop rows after a round, so that a resumed run writes each round once; unreadable lines go to a file beside it.

    That file is ``metrics.jsonl.unreadable``.
    """
    rows, unreadable = _read(path)
    if unreadable:
        aside = path.with_name(path.name + ".unreadable")
        log.warning("%d unreadable lines of %s are now in %s", len(unreadable), path, aside.name)
        before = aside.read_bytes() if aside.is_file() else b""
        write_atomically(aside, before + b"".join(line + b"\n" for line in unreadable), mode=0o600)
    kept = [row for row in rows if row["round"] <= last_round]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept), mode=0o600)


def _read(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The rows, the last of each round, and the lines that are no rows."""
    rows: dict[int, dict[str, Any]] = {}
    unreadable = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            row = json.loads(line)
            number = row["round"]
            if type(number) is not int:
                raise TypeError(f"round {number!r}")
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            if line.strip():
                unreadable.append(line)
            continue
        rows.pop(number, None)
        rows[number] = row
    return list(rows.values()), unreadable


def training_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the rounds in which clients train: all but round 0."""
    return [row for row in read_rows(path) if row["round"]]


def round_line(row: dict[str, Any], num_rounds: int) -> str:
    """A round in one line."""
    spent = row.get("epsilon")
    privacy = f", epsilon {spent['largest']:.3g} per {spent['unit']}" if spent else ""
    head = f", head {row['head']}" if row.get("head") else ""
    if row.get("perplexity") is not None:
        head += f", perplexity {row['perplexity']:.4g}"
    if row.get("f1") is not None:
        head += f", F1 of entities {row['f1']:.3f}"
    if row.get("margin") is not None:
        head += f", reward margin {row['margin']:.3g}"
    if row.get("general_loss") is not None:
        head += f", loss on general text {row['general_loss']:.3f}"
    if row.get("generation"):
        head += f", ROUGE-L {row['generation']['rouge_l']:.3f}"
        if "valid" in row["generation"]:
            head += f", {row['generation']['valid']:.0%} valid"
    return (
        f"round {row['round']}/{num_rounds}: train loss {_number(row.get('train_loss'))}, "
        f"loss {_number(row.get('loss'))}, accuracy {_number(row.get('accuracy'))} "
        f"({row.get('evaluated') or 'not evaluated'}){head}, {row['clients']} clients, {row['rejected']} rejected"
        f"{privacy}, {row['seconds']:.1f} s"
    )


def rounds_table(rows: list[dict[str, Any]], title: str) -> Table:
    """The table of rounds.

    ``train`` is the training loss; ``on`` says what loss and accuracy were measured on: the central test set, or the
    clients' held-out parts; ``ppl.`` is a language model's perplexity, ``F1`` that of entities; ``ok`` and ``bad``
    count the replies that were merged and rejected.
    """
    more = {"perplexity": "ppl.", "margin": "margin", "f1": "F1"}
    more = {key: name for key, name in more.items() if any(row.get(key) is not None for row in rows)}
    result = Table(title=title, padding=(0, 1, 0, 0) if more else (0, 1))  # 80 columns hold one more so
    for name in (
        "round",
        "train",
        "loss",
        "acc.",
        *more.values(),
        "on",
        "up MB",
        "down MB",
        "s",
        "ok",
        "bad",
    ):
        result.add_column(name, justify="right")
    for row in rows:
        result.add_row(
            str(row["round"]),
            _number(row.get("train_loss")),
            _number(row.get("loss")),
            _number(row.get("accuracy")),
            *(_number(row.get(key)) for key in more),
            row.get("evaluated") or "-",
            f"{row['bytes_up'] / 1e6:.2f}",
            f"{row['bytes_down'] / 1e6:.2f}",
            f"{row['seconds']:.1f}",
            str(row["clients"]),
            str(row["rejected"]),
        )
    return result


def rounds_picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw loss and accuracy over the rounds; the last point of the central test set is the final adapter's."""
    figure = rounds_figure(rows)
    figure.savefig(path, dpi=110)


def rounds_figure(rows: list[dict[str, Any]]) -> "Figure":
    """Loss and accuracy over the rounds, where they were measured."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    central = [row for row in rows if row.get("evaluated") == "central"]
    clients = [row for row in rows if row.get("client_accuracy") is not None]
    held_out = "clients' held-out parts"
    curves = (
        (losses, "train_loss", rows, "training, clients", ":"),
        (losses, "client_loss", clients, held_out, "--"),
        (losses, "loss", central, "central test set", "-"),
        (accuracies, "client_accuracy", clients, held_out, "--"),
        (accuracies, "accuracy", central, "central test set", "-"),
    )
    for axes, key, chosen, label, style in curves:
        points = [(row["round"], row[key]) for row in chosen if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=label)
    for axes, name in ((losses, "loss"), (accuracies, "accuracy")):
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    return figure


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
