"""The server's part of secure aggregation: one round of Flower's SecAgg+ workflow, from messages to a mean.

Flower has SecAgg+ as a workflow for its older strategies. `secure_mean` gives it what it needs of one of those (who is
asked, what they are sent, where the result goes) and corrects four things: the masks (`bora_fl.privacy.masks`);
clients that vanish before their key shares are out, whose masks are in no vector and need not be removed; replies,
which it takes on trust (`bora_fl.wire.masked`); and the threshold, which it rounds down to one half.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import flwr.server.workflow.secure_aggregation.secaggplus_workflow as protocol
import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.common import FitIns, FitRes, NDArrays, Parameters, parameters_to_ndarrays
from flwr.common.constant import ErrorCode
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.serverapp import Grid

from bora_fl.config import PrivacySettings
from bora_fl.privacy import masks
from bora_fl.state import AdapterState, flatten, unflatten
from bora_fl.strategies.exchange import exchange
from bora_fl.wire.masked import MaskedReplies
from bora_fl.wire.records import part_of
from bora_fl.wire.replies import RejectedReplyError

log = logging.getLogger(__name__)

vars(protocol)["pseudo_rand_gen"] = masks.expand
_MODULUS_BITS, _MOST_BITS = 32, 30
_TOO_FEW = "too few clients were left to unmask the sum"
_NO_MEAN = (
    "the unmasked sum is no mean of updates: some client's masks, or shares of masks, are not what they should be"
)
_ALONE = (
    "the only client of its round: the sum would be its update in the clear; raise strategy.fraction-train or "
    "strategy.min-nodes, or set privacy.secure-aggregation to false"
)


@dataclass(frozen=True)
class SecureMean:
    """What a round of the protocol yields.

    Attributes:
        mean: The weighted mean of the clients' arrays, float64; None if there is none.
        nodes: Whose updates are in the mean.
        failures: Node to why it dropped out.
        bytes_up: Size of what the clients sent.
        reason: Why there is no mean.
    """

    mean: list["np.ndarray[Any, np.dtype[np.float64]]"] | None
    nodes: frozenset[int]
    failures: Mapping[int, str]
    bytes_up: int
    reason: str = ""

    def rejected(self) -> dict[str, str]:
        """Node to the reason why it is not in the mean; under ``sum`` why there is none, where no node is at fault."""
        found = {str(node): reason for node, reason in self.failures.items() if node not in self.nodes}
        return found or ({"sum": self.reason} if self.reason else {})


class _Node(NamedTuple):
    """What the workflow asks of a client proxy."""

    node_id: int


class _Nodes:
    """Stands in for a strategy and its client manager: fixed nodes, and a place for the result."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self.nodes, self.members = nodes, frozenset[int]()
        self.result: NDArrays | None = None

    def num_available(self) -> int:
        return len(self.nodes)

    def configure_fit(self, round: int, parameters: Parameters, manager: object) -> list[tuple[_Node, FitIns]]:
        return [(_Node(node), FitIns(Parameters([], ""), {})) for node in self.nodes]

    def aggregate_fit(
        self, round: int, results: Sequence[tuple[_Node, FitRes]], failures: object
    ) -> tuple[None, dict[str, float]]:
        self.members = frozenset(node.node_id for node, _ in results)
        self.result = parameters_to_ndarrays(results[0][1].parameters)
        return None, {}


class _Watched:
    """A grid that checks what comes back, and notes sizes and who failed, which the workflow does not."""

    def __init__(self, grid: Grid, shapes: Sequence[tuple[int, ...]]) -> None:
        self._grid, self._replies = grid, MaskedReplies(shapes, 2**_MODULUS_BITS)
        self.failures: dict[int, str] = {}
        self.bytes_up = 0

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        sent = {m.metadata.dst_node_id: m for m in messages}
        asked = {node: dict(m.content.config_records[RECORD_KEY_CONFIGS]) for node, m in sent.items()}
        replies = exchange(self._grid, sent.values(), math.inf if timeout is None else timeout)
        silent = sent.keys() - {m.metadata.src_node_id for m in replies}
        self.failures |= dict.fromkeys(sorted(silent), "no reply in time")
        for place, reply in enumerate(replies):
            node = reply.metadata.src_node_id
            if reply.has_error():
                words = str(reply.error.reason).split()
                self.failures[node] = f"error {reply.error.code}: {' '.join(words)[:500]}"
                continue
            self.bytes_up += sum(_size(record) for record in reply.content.config_records.values())
            try:
                reply.content = self._replies.read(node, reply.content, asked[node])
            except RejectedReplyError as rejected:
                self.failures[node] = rejected.reason
                error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, rejected.reason)
                replies[place] = Message(error, reply_to=sent[node])
        return replies


class _Round(protocol.SecAggPlusWorkflow):
    """The workflow with this round's own messages in its third stage."""

    def __init__(self, contents: Mapping[int, RecordDict], threshold: int, **keywords: Any) -> None:
        super().__init__(1.0, threshold, **keywords)
        self._contents = contents

    def setup_stage(self, grid: Grid, context: LegacyContext, state: protocol.WorkflowState) -> bool:
        held = super().setup_stage(grid, context, state)
        state.nid_to_fitins = dict(self._contents)
        return held

    def share_keys_stage(self, grid: Grid, context: LegacyContext, state: protocol.WorkflowState) -> bool:
        held = super().share_keys_stage(grid, context, state)
        there = state.active_node_ids
        state.sampled_node_ids = set(there)
        state.nid_to_neighbours = {node: state.nid_to_neighbours[node] & there for node in there}
        return held and self._check_threshold(state)


def secure_mean(
    grid: Grid,
    messages: Iterable[Message],
    settings: PrivacySettings,
    shapes: Sequence[tuple[int, ...]],
    *,
    round: int,
    max_weight: float,
    timeout: float,
) -> SecureMean:
    """Run one round of the protocol.

    Args:
        grid: Flower's grid.
        messages: A message for each client, with what it is to train on.
        settings: The privacy settings.
        shapes: Of the arrays that a client masks.
        round: The round.
        max_weight: The largest weight that a client may have; `quantization_bits` says what it costs to be far below.
        timeout: Seconds to wait in each of the four stages.

    Raises:
        ValueError: See `quantization_bits`.
    """
    contents = {message.metadata.dst_node_id: message.content for message in messages}
    if len(contents) < 2:
        return SecureMean(None, frozenset(), dict.fromkeys(contents, _ALONE), 0, _ALONE)
    bits = quantization_bits(len(contents), settings)
    nodes, watched = _Nodes(list(contents)), _Watched(grid, shapes)
    context = LegacyContext(
        Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={}),
        strategy=cast(Any, nodes),
        client_manager=cast(Any, nodes),
    )
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: round})
    context.state.array_records[MAIN_PARAMS_RECORD] = ArrayRecord()
    workflow = _Round(
        contents,
        threshold(len(contents), settings),
        max_weight=float(max_weight),
        clipping_range=settings.clipping_range,
        quantization_range=2**bits,
        modulus_range=2**_MODULUS_BITS,
        timeout=timeout,
    )
    reason = ""
    try:
        workflow(cast(Grid, watched), context)
    except ValueError as error:  # shares that make no secret
        log.warning("round %d: %s", round, error)
        reason = _NO_MEAN
    if nodes.result is None:
        return SecureMean(None, frozenset(), watched.failures, watched.bytes_up, reason or _TOO_FEW)
    # Clients mask nothing beyond the range, and a mask that was not taken off spreads over the whole modulus.
    most = settings.clipping_range * (1 + 4 * max_weight / 2**bits)  # with what rounding adds
    if not all(bool((np.abs(array) <= most).all()) for array in nodes.result):
        return SecureMean(None, frozenset(), watched.failures, watched.bytes_up, _NO_MEAN)
    return SecureMean(nodes.result, nodes.members, watched.failures, watched.bytes_up)


def threshold(clients: int, settings: PrivacySettings) -> int:
    """How many clients must answer to the end: with half of them alone, a server that tells one half that a client is
    there and the other that it is not would have both of its secrets.
    """
    return max(round(settings.secure_threshold * clients), clients // 2 + 1)


def quantization_bits(clients: int, settings: PrivacySettings) -> int:
    """Return how many bits an entry has in a round of so many clients.

    An entry v of weight w is sent as v · w / max_weight in steps of `s = 2 · clipping_range / 2^bits`, rounded at
    random, so that an entry of the mean of K equal clients has an error of standard deviation at most
    `s / (2 √K) · max_weight / w`. Weights far below the largest allowed multiply it, and nobody may know them in the
    clear: the bits that a sum of K has to spare make up for it instead.

    Raises:
        ValueError: If the sum modulo 2³² has no room for the clients.
    """
    room = _MODULUS_BITS - clients.bit_length()  # the sum of K entries stays below K · 2^bits
    bits = settings.quantization_bits or min(_MOST_BITS, room)
    if bits > room or bits < 8:
        raise ValueError(
            f"{clients} clients in a round with privacy.quantization-bits = {settings.quantization_bits}: the sum has "
            f"room for {2 ** (_MODULUS_BITS - max(bits, 8)) - 1}; set the bits to 0, or lower strategy.fraction-train"
        )
    return bits


def masked_shapes(current: AdapterState, parts: frozenset[str]) -> list[tuple[int, ...]]:
    """Shapes of the arrays that a client masks: each tensor of these parts, by name, and the training loss."""
    return [tuple(t.shape) for name, t in flatten(current).items() if part_of(name) in parts] + [(1,)]


def moved_by(
    current: AdapterState, parts: frozenset[str], mean: Sequence["np.ndarray[Any, np.dtype[np.float64]]"]
) -> tuple[AdapterState, float]:
    """The state that the clients' mean update leads to, and their mean training loss.

    Args:
        current: What the clients were sent.
        parts: The parts that they trained and shared, of A, sigma, B, tensors.
        mean: The protocol's result, of `masked_shapes`.
    """
    flat = flatten(current)
    names = [name for name in flat if part_of(name) in parts]
    *moves, loss = mean
    for name, move in zip(names, moves, strict=True):
        reached = flat[name].double() + torch.from_numpy(move)
        flat[name] = (reached if flat[name].is_floating_point() else reached.round()).to(flat[name].dtype)
    return unflatten(flat), float(loss[0])


def _size(record: ConfigRecord) -> int:
    values = [value for entry in record.values() for value in (entry if isinstance(entry, list) else [entry])]
    return sum(len(value) for value in values if isinstance(value, bytes))
