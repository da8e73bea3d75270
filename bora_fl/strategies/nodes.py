"""Node discovery and sampling: which nodes are connected, which partition each serves, and who takes part."""

import logging
import random
import time
from collections import Counter
from collections.abc import Callable

from flwr.app import Message
from flwr.serverapp import Grid

from bora_fl.config import StrategySettings
from bora_fl.seeds import derive
from bora_fl.strategies.exchange import exchange, hello
from bora_fl.wire.replies import RejectedReplyError, read_roll_call

log = logging.getLogger(__name__)


class NodesMissingError(RuntimeError):
    """Too few nodes connected in time."""


class Nodes:
    """The connected nodes by partition.

    Node ids differ from run to run, partitions do not: sampling and summation go by partition.

    Args:
        settings: The strategy's settings.
        seed: The run's seed.
    """

    def __init__(self, settings: StrategySettings, seed: int) -> None:
        self._settings, self._seed = settings, seed
        self._partitions: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._claims: dict[int, int] = {}

    @property
    def num_partitions(self) -> int:
        """How many partitions there are, by the word of most nodes; the fewest of what equally many say."""
        said = Counter(self._claims.values())
        return min(said, key=lambda count: (-said[count], count), default=1)

    def partition(self, node: int) -> int | None:
        """The partition that a node serves; None for an unknown node."""
        return self._partitions.get(node)

    def called(self, node: int) -> str:
        """A node in a message: by its site's name and partition, as far as they are known."""
        client = self._partitions.get(node)
        known = [f"client {client}"] if client is not None else []
        first, *rest = [*filter(None, [self._names.get(node)]), *known, f"node {node}"]
        return f"{first} ({', '.join(rest)})" if rest else first

    def called_client(self, client: int) -> str:
        """A client in a message: see `called`."""
        return next(
            (self.called(node) for node, served in self._partitions.items() if served == client), f"client {client}"
        )

    def gather(self, grid: Grid) -> dict[str, str]:
        """Wait before round 1 for ``strategy.min-nodes``, or for as many nodes as most say there are.

        Returns:
            Node id to the reason why the node is left out.

        Raises:
            NodesMissingError: If the nodes do not connect within ``strategy.wait-seconds``.
        """
        left_out, known = dict[str, str](), 0

        def wanted(there: int) -> int:
            nonlocal known
            if there > known and not self._settings.min_nodes:  # who has come may say another number
                left_out.update(self.discover(grid))
                known = there
            return self._settings.min_nodes or self.num_partitions

        wait_for_nodes(grid, wanted, self._settings.wait_seconds)
        left_out |= self.discover(grid)
        for node, count in self._claims.items():
            if count != self.num_partitions:
                text = "%s says that there are %d clients, where most say %d"
                log.warning(text, self.called(node), count, self.num_partitions)
        return left_out

    def discover(self, grid: Grid) -> dict[str, str]:
        """Ask each node that is new which partition it serves; forget those that are gone.

        Returns:
            Node id to the reason why the node is left out.

        Raises:
            NodesMissingError: If fewer than ``strategy.min-nodes`` connect within ``strategy.wait-seconds``.
        """
        nodes = wait_for_nodes(grid, lambda _: max(self._settings.min_nodes, 1), self._settings.wait_seconds)
        self._partitions = {node: partition for node, partition in self._partitions.items() if node in nodes}
        self._claims = {node: count for node, count in self._claims.items() if node in nodes}
        new = [node for node in nodes if node not in self._partitions]
        if not new:
            return {}
        left_out: dict[str, str] = {}
        messages = [Message(hello(), dst_node_id=node, message_type="query") for node in new]
        replies = exchange(grid, messages, self._settings.timeout)
        for message in sorted(replies, key=lambda m: m.metadata.src_node_id):
            node = message.metadata.src_node_id
            try:
                partition, self._claims[node], self._names[node] = read_roll_call(message)
                if partition in self._partitions.values():
                    raise RejectedReplyError(node, f"another node serves partition {partition} already")
            except RejectedReplyError as rejected:
                log.warning("%s is left out: %s", self.called(node), rejected.reason)
                left_out[str(node)] = rejected.reason
                continue
            self._partitions[node] = partition
        return left_out

    def sample(self, fraction: float, round: int, purpose: str) -> list[int]:
        """Node ids of a seeded sample, ordered by partition; at least one if there is any.

        Args:
            fraction: Share of the connected nodes; a half is rounded up.
            round: From 1.
            purpose: Names the random stream, such as ``"train"``.
        """
        if not self._partitions:
            return []
        nodes = sorted(self._partitions, key=self._partitions.__getitem__)
        count = max(1, int(fraction * len(nodes) + 0.5))
        sample = random.Random(derive(self._seed, f"sample-{purpose}", round)).sample(nodes, count)
        return sorted(sample, key=self._partitions.__getitem__)


def wait_for_nodes(grid: Grid, wanted: Callable[[int], int], seconds: float) -> list[int]:
    """Node ids, sorted, once there are enough of them.

    Args:
        grid: Flower's grid.
        wanted: How many are enough, given how many there are.
        seconds: How long to wait.

    Raises:
        NodesMissingError: If they do not connect in time.
    """
    deadline = time.monotonic() + seconds
    while len(nodes := sorted(grid.get_node_ids())) < (enough := wanted(len(nodes))):
        if time.monotonic() > deadline:
            raise NodesMissingError(
                f"{len(nodes)} of {enough} nodes are connected after {seconds:.0f} s; start more SuperNodes, or lower "
                f"strategy.min-nodes ({enough}) or raise strategy.wait-seconds ({seconds:.0f})"
            )
        time.sleep(0.2)
    return nodes
