"""The rounds of a federation: what is sent, what is taken in, the merge, and what is kept."""

import logging
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from bora_fl.config import Settings
from bora_fl.privacy.accounting import summarize
from bora_fl.report import ClientMetrics, Evaluation, RoundReport, epsilon_of, mean_train_loss
from bora_fl.state import AdapterState, flatten, flatten_deltas
from bora_fl.strategies.aggregation import Aggregator
from bora_fl.strategies.best import Best, keeps_best
from bora_fl.strategies.client_privacy import ClientPrivacy
from bora_fl.strategies.downlink import Downlink
from bora_fl.strategies.exchange import arriving, exchange
from bora_fl.strategies.head import HeadLayout, Solved, solve
from bora_fl.strategies.intake import Evaluated, Intake, Merged, Sent, take_in, take_in_evaluations, take_in_securely
from bora_fl.strategies.nodes import Nodes, NodesMissingError
from bora_fl.strategies.observer import Deltas, Observer, RunFailedError
from bora_fl.strategies.screening import credible
from bora_fl.strategies.secure_aggregation import SecureMean, masked_shapes, secure_mean
from bora_fl.strategies.server_state import ServerState
from bora_fl.strategies.trial import tried
from bora_fl.tracking import activity
from bora_fl.wire.records import Instruction, size, to_arrays
from bora_fl.wire.schema import INSTRUCTION

log = logging.getLogger(__name__)


class Rounds:
    """The rounds of a federation of adapters, with any `Aggregator`.

    Every reply is checked before any arithmetic, and rejected with its node and reason if something is wrong with it;
    replies are ordered by partition, clients are sampled by a generator seeded with (run seed, round), so that a run
    depends on nothing but its config.

    A subclass may override `configure_train`, `take_in`, `merge` and `configure_evaluate`, the stages of `round`.

    Args:
        settings: The run's settings.
        aggregator: The method; by default the one that the settings describe.
        run_id: Names the run on the sites.
        observer: Is told of each round.
        head: Where the classification head stands in the adapter's state; with it the head is solved as
            ``head.init`` and ``head.solve-again`` say.
    """

    def __init__(
        self,
        settings: Settings,
        aggregator: Aggregator | None = None,
        run_id: str = "",
        observer: Observer | None = None,
        head: HeadLayout | None = None,
    ) -> None:
        self.settings, self.observer = settings, observer or Observer()
        self.run_id = run_id or uuid.uuid4().hex
        self.aggregator = aggregator or tried(settings)
        self.head = head if settings.solves_head else None
        self.nodes = Nodes(settings.strategy, settings.run.seed)
        self.state = ServerState.start(AdapterState())
        self.folds: Deltas = []
        self._downlink = Downlink()
        self._asked, self._ended = 0, False
        self._train_config, self._evaluate_config = ConfigRecord(), ConfigRecord()
        self._keeps_best = keeps_best(settings, self.aggregator.shares())
        self._feedback = int(settings.wire.feedback and not self.aggregator.preset.no_server_optimizer)
        self._privacy = ClientPrivacy.build(settings, self.aggregator.linear)

    def summary(self) -> None:
        """Log the method in words."""
        for line in self.aggregator.summary().splitlines():
            log.info("%s", line)

    # --- the run -----------------------------------------------------------------------------------------------------

    def run(self, grid: Grid, state: ServerState, folds: Deltas, first_round: int) -> ServerState:
        """Rounds ``first_round`` to ``run.num-rounds``; round 0 solves the head and measures what training starts from.

        Args:
            grid: Flower's grid.
            state: Where to start: the initial adapter or a checkpoint's.
            folds: Every base delta so far.
            first_round: 0, or one past the checkpoint's round.

        Returns:
            The final state.

        Raises:
            RunFailedError: If nodes are missing for longer than ``strategy.wait-seconds``, or no client has ever been
                of use.
        """
        self.state, self.folds = state if self._keeps_best else replace(state, best=None), folds
        self.summary()
        try:
            self.nodes.gather(grid)
            if self._privacy:
                self._privacy.check(state, self.nodes.num_partitions)
            self.observer.on_start(self.nodes.num_partitions)
            usable = first_round > 1
            for number in range(first_round, self.settings.run.num_rounds + 1):
                if self._ended or self._is_over(number - 1):
                    break
                activity.begin(number, self.settings.run.num_rounds)
                report = self.round(grid, number) if number else self.round_zero(grid)
                usable |= report.clients > 0
                if not usable and (number or not self.settings.run.num_rounds):
                    reasons = "; ".join(f"{who}: {why}" for who, why in report.reasons.items()) or "no reply in time"
                    raise RunFailedError(f"round {number}: not one usable reply ({reasons})")
                self.observer.on_round(report, self.state, self.folds)
        except NodesMissingError as error:
            raise RunFailedError(str(error)) from error
        return self.state

    def round_zero(self, grid: Grid) -> RoundReport:
        """Solve the head, and measure what training starts from: the floor of every later round."""
        started = time.perf_counter()
        solved = self.solve_head(grid, 0)
        self._advance(solved.state)
        central = self.observer.evaluate(0, self.state, self.folds)
        loss, accuracy = central or (None, None)
        return RoundReport(
            *(0, loss, accuracy, "central" if central else "", solved.name),
            epsilon=solved.epsilon,
            bytes_up=solved.bytes_up,
            bytes_down=solved.bytes_down,
            replies=solved.digests,
            seconds=time.perf_counter() - started,
            clients=solved.clients,
            rejected=len(solved.rejected),
            reasons=solved.rejected,
        )

    def round(self, grid: Grid, number: int) -> RoundReport:
        """One round: its stages in order, and a report of what they returned."""
        started = time.perf_counter()
        # 1. Prepare the state, and ask this round's sample of the nodes to train on it.
        self._advance(self.aggregator.prepare(self.state, number))
        left_out = self.nodes.discover(grid)
        arrays, timeout = to_arrays(flatten(self.state.current)), self.settings.strategy.timeout
        messages = list(self.configure_train(number, arrays, self._train_config, grid))
        bytes_down = sum(size(message.content) for message in messages)
        # 2. Take in the replies that pass every check.
        if self.settings.privacy.secure_aggregation:
            intake = self._take_in_securely(number, messages, grid)
        else:
            intake = self.take_in(number, arriving(grid, messages, timeout))
        self._downlink.settle(intake.accepted, intake.held)
        best, excess = self._note(number - 1, intake.metrics)
        # 3. Merge them, unless what they started from was so much worse than the best round that it starts again there.
        kept = number
        if best and 0 < self.settings.run.restart_margin < excess:
            log.warning(
                "the adapter of round %d has %.3f more loss than that of round %d, which comes back",
                *(number - 1, excess, best.round),
            )
            merged, kept = Merged(self.state.back_to(best.adapter)), best.round
            self._feedback = self._feedback and number + 1
        else:
            activity.tell("merge")
            merged = self.merge(number, intake, self._asked)
        self._advance(merged.state)
        # 4. Solve the head again, after the last merge by default.
        last = self._ended = number == self.settings.run.num_rounds or self._is_over(number)
        again = self._may_solve_again and self.settings.head.solves_after(number, last=last)
        solved = self.solve_head(grid, number) if again else Solved(self.state)
        self._advance(solved.state)
        # 5. Evaluate the result, and go back to an earlier one that did better.
        evaluations = self._evaluate_on_clients(grid, number, last)
        measured, rejected = evaluations.metrics, evaluations.rejected
        best = self._note(number, measured)[0] if last else None
        if best and best.round < number and best.fold_version == self.state.fold_version:
            log.info("the adapter of round %d has the least held-out loss, and is kept", best.round)
            self._advance(self.state.back_to(best.adapter))
            measured, kept, solved = best.metrics(), best.round, replace(solved, name="")
        central = self.observer.evaluate(number, self.state, self.folds)
        # 6. Report.
        self._warn(number, intake.rejected | rejected, intake.screened)
        screened = {str(client): reason for client, reason in intake.screened.items()}
        reasons = left_out | intake.rejected | screened | rejected | solved.rejected
        reported = {client: intake.metrics.get(client, ClientMetrics()) for client in intake.metrics | measured}
        reported |= {client: reported[client].joined(metrics) for client, metrics in measured.items()}
        clients = Evaluation.of((measured or reported).values())
        loss, accuracy, evaluated = None, None, ""
        if central:
            (loss, accuracy), evaluated = central, "central"
        elif clients:
            loss, accuracy, evaluated = clients.loss, clients.accuracy, "clients"
        return RoundReport(
            number,
            loss,
            accuracy,
            evaluated,
            solved.name,
            kept if kept < number else None,
            train_loss=mean_train_loss(intake.metrics.values()) if intake.metrics else intake.train_loss,
            client_loss=clients.loss if clients else None,
            client_accuracy=clients.accuracy if clients else None,
            client_accuracy_min=clients.worst if clients else None,
            bytes_up=intake.bytes_up + solved.bytes_up,
            replies=intake.digests | solved.digests | evaluations.digests,
            bytes_down=bytes_down + solved.bytes_down,
            seconds=time.perf_counter() - started,
            server_seconds=merged.seconds,
            clients=intake.clients,
            rejected=len(reasons),
            reasons=reasons | ({"merge": merged.reason} if merged.reason else {}),
            epsilon=merged.epsilon or epsilon_of(intake.metrics),
            strategy=merged.report,
            per_client=dict(sorted(reported.items())),
        )

    # --- its stages --------------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Train messages for this round's sample of the nodes."""
        strategy = self.settings.strategy
        wanted = strategy.evaluate_in_train and self.settings.run.evaluates(server_round)
        evaluate = wanted and not self.settings.privacy.secure_aggregation
        nodes = self.nodes.sample(strategy.fraction_train, server_round, "train")
        self._asked = len(nodes)
        return self._messages(nodes, "train", server_round, arrays, evaluate, config)

    def take_in(self, server_round: int, replies: Iterable[Message]) -> Intake:
        """The updates of the replies that pass every check."""
        return take_in(
            replies,
            self._sent(server_round),
            self.settings,
            self.aggregator.shares(),
            lambda state: self.observer.held_out_loss(state, self.folds),
            *([self._privacy.refuses] if self._privacy else []),
        )

    def merge(self, server_round: int, intake: Intake, cohort: int) -> Merged:
        """Merge the updates of a round; with too few of them, or a result that is not finite, nothing changes.

        Args:
            server_round: From 1.
            intake: What the replies yield.
            cohort: How many clients were asked.
        """
        wanted = self.settings.strategy.min_replies
        # Where updates are private, whether a round counts must not depend on what they hold: all that came count.
        replies = intake.answered if self._privacy else intake.clients
        if replies < wanted:
            words = "round %d: %d usable replies, strategy.min-replies is %d; the adapter stays as it was"
            log.warning(words, server_round, replies, wanted)
            return Merged(self.state)
        started = time.perf_counter()
        booked, updates, epsilon = self.state, list(intake.updates), None
        if self._privacy:
            parts = self.aggregator.trains(server_round) & self.aggregator.shares()
            booked, updates, spent = self._privacy.protect(booked, updates, parts, cohort)
            epsilon = summarize({"run": spent}, "client")
        # What the round has spent stays spent, whatever becomes of the merge.
        merged = Merged.by(partial(self.aggregator.aggregate, booked, updates, server_round), booked)
        if merged.reason:
            log.error("round %d: %s", server_round, merged.reason)
        return replace(merged, epsilon=epsilon, seconds=time.perf_counter() - started)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Evaluation messages, if the config asks for a round of its own; as often as the server itself evaluates."""
        fraction = self.settings.strategy.fraction_evaluate
        if fraction == 0 or not self.settings.run.evaluates(server_round):
            return []
        nodes = self.nodes.sample(fraction, server_round, "evaluate")
        return self._messages(nodes, "evaluate", server_round, arrays, True, config)

    def _messages(
        self, nodes: Sequence[int], kind: str, round: int, arrays: ArrayRecord, evaluate: bool, config: ConfigRecord
    ) -> list[Message]:
        instruction = Instruction(
            round=round,
            run_id=self.run_id,
            trains=self.aggregator.trains(max(round, 1)),
            shares=self.aggregator.shares(),
            evaluate=evaluate,
            fold_version=self.state.fold_version,
            sparsity=self.settings.strategy.upload_fraction if self.aggregator.preset.sparse else 1.0,
            class_shares=self.state.class_shares,
            sparsity_by=self.aggregator.preset.sparse or "entries",
            gram=self.aggregator.gram if kind == "train" else "",
            keeps=self.aggregator.keeps(max(round, 1), secure=self.settings.privacy.secure_aggregation),
            feedback=self._feedback,
        )
        messages, flat = [], flatten(self.state.current)
        for node, records, base in self._downlink.parcels(nodes, flat, arrays, self.folds):
            content = RecordDict({**records, INSTRUCTION: replace(instruction, base=base).record()})
            if config:
                content["config"] = config
            messages.append(Message(content, node, kind, group_id=str(round)))
        if kind == "train":
            self._downlink.expect(nodes, flat, instruction.keeps)
        return messages

    def _sent(self, server_round: int) -> Sent:
        parts = self.aggregator.trains(server_round) & self.aggregator.shares()
        return Sent(server_round, self.state, parts, self.nodes.partition, self.aggregator.gram)

    @property
    def _may_solve_again(self) -> bool:
        return self.head is not None and self.settings.privacy.mode == "none" and "tensors" in self.aggregator.shares()

    def solve_head(self, grid: Grid, server_round: int) -> Solved:
        """Solve the classification head from the clients' sums, if the settings and the model have one to solve."""
        if self.head is None:
            return Solved(self.state)
        left_out = self.nodes.discover(grid)
        adapter = to_arrays(flatten(self.state.current))

        def ask(kind: str, records: Mapping[str, ConfigRecord | ArrayRecord]) -> list[Message]:
            nodes = self.nodes.sample(1.0, server_round, "head")
            messages = self._messages(nodes, kind, server_round, adapter, False, ConfigRecord())
            for message in messages:
                message.content.update(records)
            return messages

        def order(node: int) -> int:
            return self.nodes.partition(node) or 0

        masked = partial(self._secure_mean, grid, server_round, 1) if self.settings.privacy.secure_aggregation else None
        answers = partial(arriving, grid, timeout=self.settings.strategy.timeout)
        solved = solve(self.head, self.state, self.settings, server_round, ask, answers, order, masked)
        self._warn(server_round, solved.rejected)
        return replace(solved, rejected=left_out | solved.rejected)

    def _take_in_securely(self, server_round: int, messages: Iterable[Message], grid: Grid) -> Intake:
        sent, privacy = self._sent(server_round), self.settings.privacy
        max_weight = privacy.max_examples if self.settings.strategy.weighting == "examples" else 1
        shapes = masked_shapes(sent.state.current, sent.parts)
        found = self._secure_mean(grid, server_round, max_weight, messages, *shapes)
        # They may have lacked what they are sent with the next round.
        self._downlink.forget(found.failures.keys() - found.nodes, folds=True)
        return take_in_securely(found, sent, report_loss=privacy.mode == "none")

    def _secure_mean(
        self, grid: Grid, round: int, max_weight: int, messages: Iterable[Message], *shapes: tuple[int, ...]
    ) -> SecureMean:
        privacy, timeout = self.settings.privacy, self.settings.strategy.timeout
        return secure_mean(grid, messages, privacy, shapes, round=round, max_weight=max_weight, timeout=timeout)

    def _evaluate_on_clients(self, grid: Grid, number: int, last: bool) -> Evaluated:
        arrays = to_arrays(flatten(self.state.current))
        if last and self._keeps_best:
            nodes = self.nodes.sample(1.0, number, "evaluate")
            messages = self._messages(nodes, "evaluate", number, arrays, True, self._evaluate_config)
        else:
            messages = list(self.configure_evaluate(number, arrays, self._evaluate_config, grid))
        replies = exchange(grid, messages, self.settings.strategy.timeout) if messages else []
        found = take_in_evaluations(replies, self.nodes.partition)
        self._downlink.forget(map(int, found.rejected))
        return found

    def _note(self, number: int, metrics: Mapping[int, ClientMetrics]) -> tuple[Best | None, float]:
        """Keep what clients have evaluated, if it is the best so far; the best so far, and how far this is above it."""
        if not self._keeps_best:
            return None, 0.0
        ratio = self.settings.strategy.max_weight_ratio
        found = Best.of(number, self.state.current, credible(metrics, ratio), self.state.fold_version)
        if found is None or self.state.best is None or found.beats(self.state.best):
            self.state = replace(self.state, best=found or self.state.best)
            return self.state.best, 0.0
        return self.state.best, found.excess(self.state.best)

    def _is_over(self, number: int) -> bool:
        """Whether an evaluated round is the last before its time, since ``run.patience`` rounds had no lower loss."""
        run, best = self.settings.run, self.state.best
        tired = bool(run.patience and best and number - 1 - best.round >= run.patience)
        return tired and self._keeps_best and run.evaluates(number)

    def _advance(self, state: ServerState) -> None:
        """Go on with a state, and keep its base delta if it is a new one."""
        if state.fold_version > self.state.fold_version:
            self.folds.append(flatten_deltas(state.fold))
        self.state = state

    def _warn(
        self, round: int, rejected: Mapping[str, str], screened: Mapping[int, str] = MappingProxyType({})
    ) -> None:
        """Say whose replies were rejected: by node, and by client those that were screened."""
        named = {self.nodes.called(int(who)) if who.isdigit() else who: why for who, why in rejected.items()}
        named |= {self.nodes.called_client(client): why for client, why in screened.items()}
        for who, why in named.items():
            log.warning("round %d: rejected the reply of %s: %s", round, who, why)
