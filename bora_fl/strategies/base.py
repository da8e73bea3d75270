"""The one class between Flower's strategy interface and the pure aggregators."""

import logging
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from bora_fl.config import Settings
from bora_fl.privacy.accounting import summarize
from bora_fl.report import RoundReport
from bora_fl.seeds import derive
from bora_fl.state import AdapterState, ClientUpdate, flatten, flatten_factors, unflatten
from bora_fl.strategies.aggregation import Aggregator, ServerState
from bora_fl.strategies.client_privacy import ClientPrivacy
from bora_fl.strategies.exchange import exchange, hello
from bora_fl.strategies.screening import screen
from bora_fl.strategies.secure_aggregation import moved_by, secure_mean
from bora_fl.wire.records import Instruction, from_arrays, to_arrays
from bora_fl.wire.replies import RejectedReplyError, read_evaluation, read_reply, read_roll_call, require_positive_sigma
from bora_fl.wire.schema import FOLDS, INSTRUCTION, STATE

log = logging.getLogger(__name__)

ALL_PARTS = frozenset({"A", "sigma", "B", "tensors"})


class RunFailedError(RuntimeError):
    """The run cannot go on; its last checkpoint is whole."""


class Observer(Protocol):
    """Who is told of each round: checkpoints, metrics and progress."""

    def on_start(self, num_partitions: int) -> None:
        """The federation is there."""

    def evaluate(self, round: int, state: ServerState, folds: list[dict[str, Tensor]]) -> tuple[float, float] | None:
        """Central loss and accuracy of a state, or None."""

    def held_out_loss(self, state: AdapterState, folds: list[dict[str, Tensor]]) -> float:
        """Loss of a client's or the server's adapter on the examples kept for screening."""

    def on_round(self, report: RoundReport, state: ServerState, folds: list[dict[str, Tensor]]) -> None:
        """A round has ended; whatever must survive a crash is written here."""


class FederatedStrategy(Strategy):
    """Runs a federation of adapters with any `Aggregator`.

    Every reply is checked before any arithmetic and set aside with its node and reason if something is wrong with it;
    replies are ordered by partition, clients are sampled by a generator seeded with (run seed, round), so that a run
    depends on nothing but its config.

    Args:
        settings: The run's settings.
        aggregator: The method.
        run_id: Names the run on the sites.
        observer: Is told of each round.
    """

    def __init__(self, settings: Settings, aggregator: Aggregator, run_id: str, observer: Observer) -> None:
        self.settings, self.aggregator, self.run_id, self.observer = settings, aggregator, run_id, observer
        self.state = ServerState.start(AdapterState())
        self.folds: list[dict[str, Tensor]] = []
        self._held: dict[int, int] = {}
        self._roster: dict[int, int] = {}
        self.num_partitions = 1
        self._report = RoundReport(0)
        self._privacy = ClientPrivacy.build(settings, aggregator.linear)
        self._cohort = 0

    def summary(self) -> None:
        """Log the method in words."""
        for line in self.aggregator.summary().splitlines():
            log.info("%s", line)

    # --- a round's messages ------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Train messages for this round's sample of the nodes."""
        strategy = self.settings.strategy
        self._call_roll(grid)
        nodes = self._sample(strategy.fraction_train, server_round, "train")
        self._cohort = len(nodes)
        evaluate = strategy.evaluate_in_train and not self.settings.privacy.secure_aggregation
        messages = self._messages(nodes, "train", server_round, arrays, evaluate)
        self._report.bytes_down += sum(_size(message.content) for message in messages)
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Evaluation messages, if the config asks for a round of its own; as often as the server itself evaluates."""
        fraction, run = self.settings.strategy.fraction_evaluate, self.settings.run
        if fraction == 0 or (server_round % run.evaluate_every and server_round != run.num_rounds):
            return []
        nodes = self._sample(fraction, server_round, "evaluate")
        return self._messages(nodes, "evaluate", server_round, arrays, True)

    def _messages(self, nodes: list[int], kind: str, round: int, arrays: ArrayRecord, evaluate: bool) -> list[Message]:
        instruction = Instruction(
            round=round,
            run_id=self.run_id,
            trains=self.aggregator.trains(round),
            shares=self.aggregator.shares(),
            evaluate=evaluate,
            fold_version=self.state.fold_version,
            sparsity=self.settings.strategy.upload_fraction if self.aggregator.preset.sparse else 1.0,
        )
        messages = []
        for node in nodes:
            content = RecordDict({STATE: arrays, INSTRUCTION: instruction.record()})
            lacking = self.folds[self._held.get(node, 0) :]
            if lacking:
                first = self._held.get(node, 0) + 1
                flat = {f"{v}/{name}": t for v, fold in enumerate(lacking, first) for name, t in fold.items()}
                content[FOLDS] = to_arrays(flat)
            messages.append(Message(content, dst_node_id=node, message_type=kind))
        return messages

    def gather(self, grid: Grid) -> int:
        """Wait before round 1 for ``strategy.min-nodes``, or for as many nodes as the first ones say there are.

        Returns:
            The number of partitions.

        Raises:
            RunFailedError: If the nodes do not come within ``strategy.wait-seconds``.
        """
        strategy = self.settings.strategy
        wait_for_nodes(grid, max(strategy.min_nodes, 1), strategy.wait_seconds)
        self._call_roll(grid)
        wait_for_nodes(grid, strategy.min_nodes or self.num_partitions, strategy.wait_seconds)
        self._call_roll(grid)
        return self.num_partitions

    def _call_roll(self, grid: Grid) -> None:
        """Learn which partition each connected node serves, asking each node once.

        Node ids differ from run to run; partitions do not, so sampling and summation go by partition.
        """
        nodes = wait_for_nodes(grid, max(self.settings.strategy.min_nodes, 1), self.settings.strategy.wait_seconds)
        self._roster = {node: partition for node, partition in self._roster.items() if node in nodes}
        new = [node for node in nodes if node not in self._roster]
        if not new:
            return
        messages = [Message(hello(), dst_node_id=node, message_type="query") for node in new]
        replies = exchange(grid, messages, self.settings.strategy.timeout)
        for message in sorted(replies, key=lambda m: m.metadata.src_node_id):
            node = message.metadata.src_node_id
            try:
                partition, self.num_partitions = read_roll_call(message)
                if partition in self._roster.values():
                    raise RejectedReplyError(node, f"another node serves partition {partition} already")
            except RejectedReplyError as rejected:
                self._set_aside(node, rejected.reason)
                continue
            self._roster[node] = partition

    def _sample(self, fraction: float, round: int, purpose: str) -> list[int]:
        if not self._roster:
            return []
        nodes = sorted(self._roster, key=lambda node: self._roster[node])
        count = max(1, round_half_up(fraction * len(nodes)))
        sample = random.Random(derive(self.settings.run.seed, f"sample-{purpose}", round)).sample(nodes, count)
        return sorted(sample, key=lambda node: self._roster[node])

    # --- a round's replies -------------------------------------------------------------------------------------------

    def accept(self, server_round: int, replies: Iterable[Message]) -> list[ClientUpdate]:
        """The updates that pass every check, ordered by client; the others are logged, counted and set aside."""
        report, sent, adapter = self._report, self.state.current, self.settings.adapter
        parts = self.aggregator.trains(server_round) & self.aggregator.shares()
        accepted: dict[int, ClientUpdate] = {}
        for message in sorted(replies, key=lambda m: m.metadata.src_node_id):
            node = message.metadata.src_node_id
            report.bytes_up += _size(message.content) if message.has_content() else 0
            try:
                state, metrics = read_reply(message, sent, parts, server_round, adapter.rank)
                if adapter.method == "bora" and adapter.sigma_transform == "exp_norm":
                    require_positive_sigma(node, state)
                client = self._roster[node]
            except RejectedReplyError as rejected:
                if rejected.folds_held is not None:
                    self._held[node] = rejected.folds_held  # what it lacks is sent with the next round
                self._set_aside(node, rejected.reason)
                continue
            self._held[node] = self.state.fold_version
            weight = metrics["num-examples"] if self.settings.strategy.weighting == "examples" else 1.0
            accepted[client] = ClientUpdate(client, weight, state)
            report.per_client[str(client)] = metrics
        updates, screened = screen(
            [accepted[c] for c in sorted(accepted)],
            self.state,
            self.settings.strategy,
            self.aggregator.shares(),
            lambda state: self.observer.held_out_loss(state, self.folds),
        )
        for client, reason in screened.items():
            self._set_aside(client, reason)
            report.per_client.pop(str(client), None)
        report.clients = len(updates)
        return updates

    def _accept_securely(self, server_round: int, messages: Iterable[Message], grid: Grid) -> list[ClientUpdate]:
        """The mean of the round's updates as one update; the server sees none of them."""
        report, strategy, privacy = self._report, self.settings.strategy, self.settings.privacy
        max_weight = privacy.max_examples if strategy.weighting == "examples" else 1
        found = secure_mean(
            grid, messages, privacy, round=server_round, max_weight=max_weight, timeout=strategy.timeout
        )
        report.bytes_up += found.bytes_up
        for node, reason in found.failures.items():
            if node not in found.nodes:
                self._set_aside(node, reason)
                self._held.pop(node, None)  # it may have lacked folds, which it is sent with the next round
        if found.mean is None:
            log.warning("round %d: too few clients were left to unmask the sum", server_round)
            return []
        self._held |= dict.fromkeys(found.nodes, self.state.fold_version)
        report.clients = len(found.nodes)
        parts = self.aggregator.trains(server_round) & self.aggregator.shares()
        state, train_loss = moved_by(self.state.current, parts, found.mean)
        if privacy.mode == "none":
            report.train_loss = train_loss
        return [ClientUpdate(0, 1.0, state)]

    def _advance(self, state: ServerState) -> None:
        """Go on with a state, and keep its fold if it is a new one."""
        if state.fold_version > self.state.fold_version:
            self.folds.append(flatten_factors(state.fold, ""))
        self.state = state

    def _set_aside(self, who: int, reason: str) -> None:
        log.warning("set aside a reply from %s: %s", who, reason)
        self._report.rejected += 1
        self._report.reasons[str(who)] = reason

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check, screen and merge; with too few usable replies the round changes nothing."""
        return self._merge(server_round, self.accept(server_round, replies))

    def _merge(self, server_round: int, updates: list[ClientUpdate]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        report = self._report
        if report.clients < self.settings.strategy.min_replies:
            log.warning(
                "round %d: %d usable replies, strategy.min-replies is %d; the adapter stays as it was",
                server_round,
                report.clients,
                self.settings.strategy.min_replies,
            )
            return None, None
        started = time.perf_counter()
        state = self.state
        if self._privacy:
            parts = self.aggregator.trains(server_round) & self.aggregator.shares()
            state, updates, spent = self._privacy.protect(state, updates, parts, self._cohort)
            report.epsilon = asdict(summarize({"run": spent}, "client"))
        state, report.strategy = self.aggregator.aggregate(state, updates, server_round)
        report.server_seconds = time.perf_counter() - started
        if not all(bool(tensor.isfinite().all()) for tensor in flatten(state.current).values()):
            report.reasons["merge"] = "the merged adapter is not finite; the adapter stays as it was"
            log.error("round %d: %s", server_round, report.reasons["merge"])
            return None, None
        self._advance(state)
        report.summarize_clients()
        return to_arrays(flatten(state.current)), MetricRecord({"train-loss": report.train_loss or 0.0})

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Mean client accuracy and loss of a separate evaluation round, weighted by examples."""
        found: dict[str, dict[str, float]] = {}
        for message in replies:
            node = str(message.metadata.src_node_id)
            try:
                found[node] = read_evaluation(message)
            except RejectedReplyError as rejected:
                self._set_aside(rejected.node_id, rejected.reason)
                continue
            client = str(self._roster.get(message.metadata.src_node_id, node))
            self._report.per_client[client] = self._report.per_client.get(client, {}) | found[node]
        if not found:
            return None
        self._report.summarize_evaluation(list(found.values()))
        return MetricRecord({"eval-accuracy": self._report.client_accuracy or 0.0})

    # --- the run -----------------------------------------------------------------------------------------------------

    def run(self, grid: Grid, state: ServerState, folds: list[dict[str, Tensor]], first_round: int) -> ServerState:
        """Rounds ``first_round`` to ``run.num-rounds``.

        Args:
            grid: Flower's grid.
            state: Where to start: the initial adapter or a checkpoint's.
            folds: Every fold so far.
            first_round: 1, or one past the checkpoint's round.

        Returns:
            The final state.

        Raises:
            RunFailedError: If nodes are missing for longer than ``strategy.wait-seconds``, or no client has ever been
                of use.
        """
        self.state, self.folds = state, folds
        self.summary()
        self.observer.on_start(self.gather(grid))
        usable = first_round > 1
        for current in range(first_round, self.settings.run.num_rounds + 1):
            started = time.perf_counter()
            self._report = report = RoundReport(current)
            self._advance(self.aggregator.prepare(self.state, current))
            arrays = to_arrays(flatten(self.state.current))
            config = ConfigRecord()
            timeout = self.settings.strategy.timeout
            messages = self.configure_train(current, arrays, config, grid)
            if self.settings.privacy.secure_aggregation:
                self._merge(current, self._accept_securely(current, messages, grid))
            else:
                self.aggregate_train(current, exchange(grid, messages, timeout))
            usable |= report.clients > 0
            if not usable:
                reasons = "; ".join(f"{who}: {why}" for who, why in report.reasons.items()) or "no reply in time"
                raise RunFailedError(f"round {current}: not one usable reply ({reasons})")
            arrays = to_arrays(flatten(self.state.current))
            evaluation = list(self.configure_evaluate(current, arrays, config, grid))
            if evaluation:
                self.aggregate_evaluate(current, exchange(grid, evaluation, timeout))
            central = self.observer.evaluate(current, self.state, self.folds)
            if central:
                report.loss, report.accuracy, report.evaluated = *central, "central"
            elif report.client_loss is not None:
                report.loss, report.accuracy = report.client_loss, report.client_accuracy
                report.evaluated = "clients"
            report.seconds = time.perf_counter() - started
            self.observer.on_round(report, self.state, self.folds)
        return self.state

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
        """Flower's entry point: `run` from round 1 on the given arrays; rounds and time-outs are the settings' own."""
        final = self.run(grid, ServerState.start(unflatten(from_arrays(initial_arrays))), [], 1)
        result = Result()
        result.arrays = to_arrays(flatten(final.current))
        return result


def wait_for_nodes(grid: Grid, wanted: int, seconds: float) -> list[int]:
    """Node ids, sorted, once there are enough of them.

    Raises:
        RunFailedError: If they do not come in time.
    """
    deadline = time.monotonic() + seconds
    while len(nodes := sorted(grid.get_node_ids())) < wanted:
        if time.monotonic() > deadline:
            raise RunFailedError(
                f"{len(nodes)} of {wanted} nodes are connected after {seconds:.0f} s; start more SuperNodes, or lower "
                f"strategy.min-nodes ({wanted}) or raise strategy.wait-seconds ({seconds:.0f})"
            )
        time.sleep(0.2)
    return nodes


def round_half_up(value: float) -> int:
    """To the nearest whole number, halves up."""
    return int(value + 0.5)


def _size(content: RecordDict) -> int:
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())
