"""A round's replies in, checked and screened updates out, and what a merge of these yields."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from flwr.app import Message

from bora_fl.config import Settings
from bora_fl.privacy.accounting import EpsilonSummary
from bora_fl.report import ClientMetrics
from bora_fl.state import AdapterState, ClientUpdate, flatten
from bora_fl.strategies.holding import Held
from bora_fl.strategies.layer_merge import Trains
from bora_fl.strategies.screening import screen
from bora_fl.strategies.secure_aggregation import SecureMean, moved_by
from bora_fl.strategies.server_state import ServerState
from bora_fl.wire.records import reply_digests, size
from bora_fl.wire.replies import RejectedReplyError, read_evaluation, read_grams, read_reply, require_positive_sigma
from bora_fl.wire.updates import Coding

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Intake:
    """What a round's replies yield.

    Attributes:
        updates: The accepted updates, ordered by client; under secure aggregation their mean, as one update.
        clients: How many clients are in `updates`.
        answered: How many replied, whatever they replied.
        metrics: Client to what it reported.
        rejected: Node to the reason why its reply is not among the updates, screening apart.
        held: Node to the newest base delta it holds.
        accepted: Nodes whose replies passed every check, screening apart.
        bytes_up: Size of the replies.
        train_loss: Mean training loss, where clients report it under secure aggregation.
        digests: Node to the digest of its reply, as it came.
        screened: Client to the reason why its update, which passed every check, is not among the updates.
    """

    updates: tuple[ClientUpdate, ...] = ()
    clients: int = 0
    answered: int = 0
    metrics: dict[int, ClientMetrics] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    accepted: frozenset[int] = frozenset()
    bytes_up: int = 0
    train_loss: float | None = None
    digests: dict[str, str] = field(default_factory=dict)
    screened: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated:
    """What the replies to evaluate messages yield.

    Attributes:
        metrics: Client to what it measured on its held-out part.
        rejected: Node to the reason why its reply is rejected.
        digests: Node and ``evaluate`` to the digest of its reply, as it came.
    """

    metrics: dict[int, ClientMetrics]
    rejected: dict[str, str]
    digests: dict[str, str]


@dataclass(frozen=True)
class Merged:
    """What a merge yields.

    Attributes:
        state: The next state; the one before if nothing was merged.
        changed: Whether anything was merged.
        report: The aggregator's report.
        epsilon: ε that the run has spent per client, under client-level privacy.
        seconds: Duration of the merge.
        reason: Why nothing was merged, if that is a fault of the merge itself.
    """

    state: ServerState
    changed: bool = False
    report: dict[str, float] = field(default_factory=dict)
    epsilon: EpsilonSummary | None = None
    seconds: float = 0.0
    reason: str = ""

    @classmethod
    def by(cls, aggregate: Callable[[], tuple[ServerState, dict[str, float]]], before: ServerState) -> "Merged":
        """What a merge yields; where numbers overflow in it, the state before it, with the reason.

        An update may hold numbers near the end of float32's range: each is finite, and their products are not.
        """
        try:
            state, report = aggregate()
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return cls(before, reason="numbers overflow in the merge; the adapter stays as it was")
        if not all(bool(tensor.isfinite().all()) for tensor in flatten(state.current).values()):
            reason = "the merged adapter is not finite; the adapter stays as it was"
            return cls(before, report=report, reason=reason)
        return cls(state, True, report)


@dataclass(frozen=True)
class Sent:
    """What a round's messages asked for, against which its replies are checked.

    Attributes:
        round: From 1.
        state: The state that the clients were sent.
        parts: The parts that a reply holds, of A, sigma, B and tensors.
        partition: A node's partition; None for a node that is not known.
        gram: What of the Gram matrices a reply holds; empty for nothing.
    """

    round: int
    state: ServerState
    parts: Trains
    partition: Callable[[int], int | None]
    gram: Literal["", "blocks", "diagonal"] = ""


def take_in(
    replies: Iterable[Message],
    sent: Sent,
    settings: Settings,
    shares: Trains,
    held_out_loss: Callable[[AdapterState], float],
    refuses: Callable[[ClientUpdate, ServerState], str] = lambda update, state: "",
) -> Intake:
    """Check every reply as it comes, before any arithmetic, and then screen the updates against each other.

    Nothing of the result depends on the order in which replies come. Updates are held as `holding` says.

    Args:
        replies: In any order.
        sent: What was asked for.
        settings: The run's settings.
        shares: The parts that may leave a client.
        held_out_loss: Loss of an adapter on the examples kept for screening.
        refuses: Why an update cannot take part, in words; empty if it can.
    """
    adapter, weighting, coding = settings.adapter, settings.strategy.weighting, Coding.of(settings)
    waiting = Held(settings.strategy.memory_mb * 1_000_000, sent.state.current)
    accepted: dict[int, ClientUpdate] = {}
    metrics: dict[int, ClientMetrics] = {}
    rejected: dict[str, str] = {}
    held: dict[int, int] = {}
    nodes: set[int] = set()
    digests: dict[str, str] = {}
    answered = bytes_up = 0
    for message in replies:
        node = message.metadata.src_node_id
        answered += 1
        digests |= reply_digests([message])
        if message.has_content():
            bytes_up += size(message.content)
        try:
            state, reported = read_reply(message, sent.state.current, sent.parts, sent.round, adapter.rank, coding)
            if adapter.transform == "exp_norm":
                require_positive_sigma(node, state)
            client = sent.partition(node)
            if client is None:
                raise RejectedReplyError(node, "the node serves no partition of this federation")
            weight = reported["num-examples"] if weighting == "examples" else 1.0
            grams = read_grams(message, sent.state.current, sent.gram) if sent.gram else {}
            update = ClientUpdate(client, weight, state, grams)
            if reason := refuses(update, sent.state):
                raise RejectedReplyError(node, reason)
        except RejectedReplyError as reply:
            if reply.folds_held is not None:
                held[node] = reply.folds_held  # what it lacks is sent with the next round
            rejected[str(node)] = reply.reason
            continue
        held[node] = sent.state.fold_version
        nodes.add(node)
        accepted[client] = waiting.hold(update)
        metrics[client] = ClientMetrics.read(reported)
    updates, screened = screen(
        [accepted[c] for c in sorted(accepted)], sent.state, settings.strategy, shares, held_out_loss
    )
    kept = {client: metrics[client] for client in sorted(metrics) if client not in screened}
    return Intake(
        tuple(updates),
        len(updates),
        answered,
        kept,
        dict(sorted(rejected.items())),
        held,
        frozenset(nodes),
        bytes_up,
        digests=dict(sorted(digests.items())),
        screened=screened,
    )


def take_in_securely(found: SecureMean, sent: Sent, *, report_loss: bool) -> Intake:
    """The mean of a round's updates as one update; the server sees none of them.

    Args:
        found: What the protocol yields.
        sent: What was asked for.
        report_loss: Whether the mean training loss may be reported.
    """
    intake = Intake(rejected=found.rejected(), bytes_up=found.bytes_up)
    if found.mean is None:
        log.warning("round %d: %s", sent.round, found.reason)
        return intake
    state, train_loss = moved_by(sent.state.current, sent.parts, found.mean)
    return replace(
        intake,
        updates=(ClientUpdate(0, 1.0, state),),
        clients=len(found.nodes),
        held=dict.fromkeys(found.nodes, sent.state.fold_version),
        accepted=frozenset(found.nodes),
        train_loss=train_loss if report_loss else None,
    )


def take_in_evaluations(replies: Iterable[Message], partition: Callable[[int], int | None]) -> Evaluated:
    """Check every reply, in any order, to an evaluate message."""
    found: dict[int, ClientMetrics] = {}
    rejected: dict[str, str] = {}
    received = sorted(replies, key=lambda m: m.metadata.src_node_id)
    for message in received:
        node = message.metadata.src_node_id
        try:
            metrics = ClientMetrics.read(read_evaluation(message))
            client = partition(node)
            if client is None:
                raise RejectedReplyError(node, "the node serves no partition of this federation")
            found[client] = metrics
        except RejectedReplyError as reply:
            rejected[str(node)] = reply.reason
    return Evaluated(found, rejected, reply_digests(received, "evaluate"))
