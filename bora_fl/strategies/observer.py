"""Who is told of a run's rounds, and how a run fails."""

from collections.abc import Callable

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Result
from torch import Tensor

from bora_fl.report import RoundReport
from bora_fl.state import AdapterState, flatten
from bora_fl.strategies.server_state import ServerState
from bora_fl.wire.records import to_arrays

Deltas = list[dict[str, Tensor]]
"""Every base delta of a run, in order, flattened."""


class RunFailedError(RuntimeError):
    """The run cannot go on; its last checkpoint is whole."""


class Observer:
    """Who is told of each round: checkpoints, metrics and progress. This one does nothing."""

    def on_start(self, num_partitions: int) -> None:
        """The federation is there."""

    def evaluate(self, round: int, state: ServerState, folds: Deltas) -> tuple[float, float] | None:
        """Central loss and accuracy of a state, or None."""

    def held_out_loss(self, state: AdapterState, folds: Deltas) -> float:
        """Loss of a client's or the server's adapter on the examples kept for screening."""
        raise ValueError("strategy.max-loss-increase needs an observer that measures the loss; set it to 0")

    def on_round(self, report: RoundReport, state: ServerState, folds: Deltas) -> None:
        """A round has ended; whatever must survive a crash is written here."""


class Recorder(Observer):
    """Keeps each round's metrics in a Flower `Result`, and passes everything on to another observer.

    Args:
        observer: The other observer.
        evaluate_fn: Flower's central evaluation, called with a round and its arrays.
    """

    def __init__(self, observer: Observer, evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None):
        self.observer, self.result, self._evaluate_fn = observer, Result(), evaluate_fn

    def evaluate_arrays(self, round: int, arrays: ArrayRecord) -> None:
        """Call `evaluate_fn`, if there is one, and keep what it returns."""
        metrics = self._evaluate_fn(round, arrays) if self._evaluate_fn else None
        if metrics is not None:
            self.result.evaluate_metrics_serverapp[round] = metrics

    def on_start(self, num_partitions: int) -> None:
        """Pass it on."""
        self.observer.on_start(num_partitions)

    def evaluate(self, round: int, state: ServerState, folds: Deltas) -> tuple[float, float] | None:
        """Evaluate by both; the other observer's result counts."""
        self.evaluate_arrays(round, to_arrays(flatten(state.current)))
        return self.observer.evaluate(round, state, folds)

    def held_out_loss(self, state: AdapterState, folds: Deltas) -> float:
        """Pass it on."""
        return self.observer.held_out_loss(state, folds)

    def on_round(self, report: RoundReport, state: ServerState, folds: Deltas) -> None:
        """Keep the clients' metrics, and pass the report on."""
        if report.train_loss is not None:
            self.result.train_metrics_clientapp[report.round] = MetricRecord({"train-loss": report.train_loss})
        if report.client_loss is not None and report.client_accuracy is not None:
            self.result.evaluate_metrics_clientapp[report.round] = MetricRecord(
                {"eval-loss": report.client_loss, "eval-accuracy": report.client_accuracy}
            )
        self.observer.on_round(report, state, folds)
