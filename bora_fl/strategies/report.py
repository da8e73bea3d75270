"""What happened in a round."""

from dataclasses import asdict, dataclass, field
from typing import get_args

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
