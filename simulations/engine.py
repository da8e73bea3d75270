"""A federation inside this process: the same ServerApp code and ClientApp handlers, no Ray, no network.

Clients take turns, so one base model serves all of them, a run is the same bit for bit every time, and it starts in
no time: right for comparisons, tests and small machines. `parallel.WorkerGrid` spreads clients over worker processes.
"""

import copy
import logging
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from bora_fl.config import Scalar, Settings, parse
from bora_fl.wire.schema import REPLY

if TYPE_CHECKING:  # with all that a server needs, which a simulation's first process starts without
    from bora_fl.server.run import Save

log = logging.getLogger(__name__)

Tamper = Callable[[Message, int], Message | None]


class InProcessGrid(Grid):
    """Hands each message to a ClientApp in this process and collects the reply.

    Args:
        app: The ClientApp.
        num_nodes: Number of SuperNodes; node i serves partition i.
        run_config: What each client's context holds.
        node_configs: More node config by partition, such as ``{2: {"rank": 4}}``.
        tamper: Called with each reply and its partition; returns what arrives, None for nothing. For fault tests.
    """

    def __init__(
        self,
        app: ClientApp,
        num_nodes: int,
        run_config: dict[str, Scalar],
        node_configs: dict[int, dict[str, Scalar]] | None = None,
        tamper: Tamper | None = None,
    ) -> None:
        self._app, self._tamper = app, tamper
        self._contexts = {
            partition + 2: Context(
                run_id=1,
                node_id=partition + 2,  # 1 is the SuperLink
                node_config={
                    "partition-id": partition,
                    "num-partitions": num_nodes,
                    **(node_configs or {}).get(partition, {}),
                },
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for partition in range(num_nodes)
        }
        self._replies: dict[str, Message] = {}
        self._sent = 0
        identify()

    def set_run(self, run: Any) -> None:
        """There is one run only."""

    @property
    def run(self) -> Any:
        """There is no record of the run here."""
        raise AttributeError("an in-process federation has no Flower run")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes; they are always connected."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run each message's handler at once."""
        ids = []
        for number, message in enumerate(messages):
            message_id = f"{self._sent}-{number}"
            reply = self._handle(message)
            if reply is not None:
                self._replies[message_id] = reply
            ids.append(message_id)
        self._sent += 1
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to the given messages."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Run the handlers one after the other, each when its reply is asked for."""
        for message in list(messages):
            yield from self.pull_messages(self.push_messages([message]))

    def _handle(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        message.content = copy.deepcopy(message.content)  # a network would copy it: handlers may change what they get
        reply = handle(self._app, message, self._contexts[node])
        if self._tamper is None or message.metadata.message_type == "query":
            return reply
        return self._tamper(reply, node - 2)


def round_of(message: Message) -> int:
    """The round that a reply belongs to; 0 for an evaluation, which names none."""
    return int(message.content.config_records.get(REPLY, ConfigRecord()).get("round", 0))  # type: ignore[arg-type]


def only_of(took_part: Mapping[int, frozenset[int]]) -> Tamper:
    """Lets only the given clients' replies through, round by round."""

    def tamper(message: Message, partition: int) -> Message | None:
        round = round_of(message)
        return message if not round or partition in took_part[round] else None

    return tamper


def identify() -> None:
    """Name this process to Flower: a Message reads its sender and run from here, as in Flower's own processes."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def handle(app: ClientApp, message: Message, context: Context) -> Message:
    """A ClientApp's reply to a message; its crash is an error reply, as over the wire."""
    try:
        return app(message, context)
    except Exception as error:
        log.debug("%s", traceback.format_exc())
        return failure(message, f"{type(error).__name__}: {error}")


def failure(message: Message, reason: str) -> Message:
    """The reply of a ClientApp that has crashed."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def simulate(
    run_config: dict[str, Scalar] | Settings,
    num_nodes: int,
    *,
    node_configs: dict[int, dict[str, Scalar]] | None = None,
    tamper: Tamper | None = None,
    app: ClientApp | None = None,
    save: "Save | None" = None,
) -> Path:
    """Run a whole federation in this process.

    Args:
        run_config: Flat run config, or settings.
        num_nodes: Number of clients.
        node_configs: See `InProcessGrid`.
        tamper: See `InProcessGrid`.
        app: The ClientApp; the product's own by default.
        save: How the server writes a checkpoint; its own way by default. For fault tests.

    Returns:
        The output folder.
    """
    from bora_fl.client.app import app as own
    from bora_fl.server.checkpoint import save as own_save
    from bora_fl.server.run import Server

    settings = run_config if isinstance(run_config, Settings) else parse(run_config)
    grid = InProcessGrid(app or own, num_nodes, settings.flat(), node_configs, tamper)
    return Server(settings, save or own_save).run(grid)
