"""The server's part of secure aggregation: one round of Flower's SecAgg+ workflow, from messages to a mean.

Flower has SecAgg+ as a workflow for its older strategies. `secure_mean` gives it what it needs of one of those (who is
asked, what they are sent, where the result goes) and corrects two things: the masks (`bora_fl.privacy.masks`), and
clients that vanish before their key shares are out, whose masks are in no vector and need not be removed.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import flwr.server.workflow.secure_aggregation.secaggplus_workflow as protocol
import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common import FitIns, FitRes, NDArrays, Parameters, parameters_to_ndarrays
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.serverapp import Grid

from bora_fl.config import PrivacySettings
from bora_fl.privacy import masks
from bora_fl.state import AdapterState, flatten, unflatten
from bora_fl.strategies.exchange import exchange
from bora_fl.wire.records import part_of

log = logging.getLogger(__name__)

vars(protocol)["pseudo_rand_gen"] = masks.expand
_MODULUS_BITS, _MOST_BITS = 32, 30
_ALONE = (
    "the only client of its round: the sum would be its update in the clear; raise strategy.fraction-train or "
    "strategy.min-nodes, or set privacy.secure-aggregation to false"
)


@dataclass(frozen=True)
class SecureMean:
    """What a round of the protocol yields.

    Attributes:
        mean: The weighted mean of the clients' arrays, float64; None if too few were left to unmask it.
        nodes: Whose updates are in the mean.
        failures: Node to why it dropped out.
        bytes_up: Size of what the clients sent.
    """

    mean: list["np.ndarray[Any, np.dtype[np.float64]]"] | None
    nodes: frozenset[int]
    failures: Mapping[int, str]
    bytes_up: int

    def rejected(self) -> dict[str, str]:
        """Node to the reason why it is not in the mean."""
        return {str(node): reason for node, reason in self.failures.items() if node not in self.nodes}


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
    """A grid that notes what comes back; the workflow itself keeps neither sizes nor who failed."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.failures: dict[int, str] = {}
        self.bytes_up = 0

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        sent = list(messages)
        replies = exchange(self._grid, sent, math.inf if timeout is None else timeout)
        silent = {m.metadata.dst_node_id for m in sent} - {m.metadata.src_node_id for m in replies}
        self.failures |= dict.fromkeys(sorted(silent), "no reply in time")
        for reply in replies:
            if reply.has_error():
                words = str(reply.error.reason).split()
                self.failures[reply.metadata.src_node_id] = f"error {reply.error.code}: {' '.join(words)[:500]}"
            else:
                self.bytes_up += sum(_size(record) for record in reply.content.config_records.values())
        return replies


class _Round(protocol.SecAggPlusWorkflow):
    """The workflow with this round's own messages in its third stage."""

    def __init__(self, contents: Mapping[int, RecordDict], settings: PrivacySettings, **keywords: Any) -> None:
        super().__init__(1.0, settings.secure_threshold, **keywords)
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
        round: The round.
        max_weight: The largest weight that a client may have; `quantization_bits` says what it costs to be far below.
        timeout: Seconds to wait in each of the four stages.

    Raises:
        ValueError: See `quantization_bits`.
    """
    contents = {message.metadata.dst_node_id: message.content for message in messages}
    if len(contents) < 2:
        return SecureMean(None, frozenset(), dict.fromkeys(contents, _ALONE), 0)
    bits = quantization_bits(len(contents), settings)
    nodes, watched = _Nodes(list(contents)), _Watched(grid)
    context = LegacyContext(
        Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={}),
        strategy=cast(Any, nodes),
        client_manager=cast(Any, nodes),
    )
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: round})
    context.state.array_records[MAIN_PARAMS_RECORD] = ArrayRecord()
    workflow = _Round(
        contents,
        settings,
        max_weight=float(max_weight),
        clipping_range=settings.clipping_range,
        quantization_range=2**bits,
        modulus_range=2**_MODULUS_BITS,
        timeout=timeout,
    )
    workflow(cast(Grid, watched), context)
    return SecureMean(nodes.result, nodes.members, watched.failures, watched.bytes_up)


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


def moved_by(
    current: AdapterState, parts: frozenset[str], mean: Sequence["np.ndarray[Any, np.dtype[np.float64]]"]
) -> tuple[AdapterState, float]:
    """The state that the clients' mean update leads to, and their mean training loss.

    Args:
        current: What the clients were sent.
        parts: The parts that they trained and shared, of A, sigma, B, tensors.
        mean: The protocol's result: an array for each tensor of these parts, by name, and the loss.

    Raises:
        ValueError: If the arrays are not those of the parts.
    """
    flat = flatten(current)
    names = [name for name in flat if part_of(name) in parts]
    *moves, loss = mean
    if [move.shape for move in moves] != [tuple(flat[name].shape) for name in names]:
        raise ValueError(f"the sum holds {len(moves)} arrays, which are not the {len(names)} tensors of the round")
    for name, move in zip(names, moves, strict=True):
        reached = flat[name].double() + torch.from_numpy(move)
        flat[name] = (reached if flat[name].is_floating_point() else reached.round()).to(flat[name].dtype)
    return unflatten(flat), float(loss[0])


def _size(record: ConfigRecord) -> int:
    values = [value for entry in record.values() for value in (entry if isinstance(entry, list) else [entry])]
    return sum(len(value) for value in values if isinstance(value, bytes))
