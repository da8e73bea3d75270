"""The one class between Flower's strategy interface and the pure aggregators."""

from collections.abc import Callable, Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from bora_fl.report import Evaluation, mean_train_loss
from bora_fl.state import flatten, unflatten
from bora_fl.strategies.intake import take_in_evaluations
from bora_fl.strategies.observer import Recorder
from bora_fl.strategies.rounds import Rounds
from bora_fl.strategies.server_state import ServerState
from bora_fl.wire.records import from_arrays, to_arrays


class FederatedStrategy(Rounds, Strategy):
    """`Rounds` as a Flower strategy, for a ServerApp of one's own."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take in and merge the replies to `configure_train`, for a loop that is not `run`."""
        intake = self.take_in(server_round, replies)
        self._downlink.settle(intake.accepted, intake.held)
        merged = self.merge(server_round, intake, self._asked)
        self._advance(merged.state)
        if not merged.changed:
            return None, None
        loss = mean_train_loss(intake.metrics.values())
        metrics = MetricRecord() if loss is None else MetricRecord({"train-loss": loss})
        return to_arrays(flatten(merged.state.current)), metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Mean loss and accuracy of the replies to `configure_evaluate`, weighted by held-out examples."""
        found = Evaluation.of(take_in_evaluations(replies, self.nodes.partition).metrics.values())
        return MetricRecord({"eval-loss": found.loss, "eval-accuracy": found.accuracy}) if found else None

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run in a ServerApp of one's own, as Flower's strategies do.

        Args:
            grid: Flower's grid.
            initial_arrays: The initial adapter, ``to_arrays(flatten(state))``.
            num_rounds: Rounds, in the place of ``run.num-rounds``.
            timeout: Seconds to wait for a round's replies, in the place of ``strategy.timeout``.
            train_config: Sent with each train message as the record ``config``.
            evaluate_config: Sent with each evaluate message as the record ``config``.
            evaluate_fn: Called with 0 and the arrays that training starts from, and after each round with its number
                and the merged ones.

        Returns:
            The merged adapter, and the metrics of each round. `observer` is told of each round too.
        """
        strategy = self.settings.strategy.model_copy(update={"timeout": timeout})
        run = self.settings.run.model_copy(update={"num_rounds": num_rounds})
        self.settings = self.settings.model_copy(update={"strategy": strategy, "run": run})
        self._train_config, self._evaluate_config = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        recorder = self.observer = Recorder(self.observer, evaluate_fn)
        try:
            final = self.run(grid, ServerState.start(unflatten(from_arrays(initial_arrays))), [], 0)
        finally:
            self.observer = recorder.observer
        recorder.result.arrays = to_arrays(flatten(final.current))
        return recorder.result
