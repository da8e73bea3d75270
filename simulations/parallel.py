"""A federation on the cores of one machine: the ServerApp here, clients in worker processes, no port.

Each worker holds the base model and the tokenized data once, for all clients that take turns in it. What a client keeps
between rounds stays here and travels with its messages, so a run is the same whichever worker a client meets.
"""

import importlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from bora_fl.config import ConfigError, Scalar, parse
from bora_fl.granted import grant
from bora_fl.simulations.engine import InProcessGrid, failure, handle, identify
from bora_fl.simulations.pool import Died, Pool
from bora_fl.tracking import activity

log = logging.getLogger(__name__)

CLIENT = "bora_fl.client.app:app"
LIBRARIES = ["bora_fl.client.job", "bora_fl.client.app"]
"""What each worker needs, imported once before they are forked."""


@dataclass(frozen=True, eq=False)
class Delivery:
    """A message on its way to a worker, with the context of the node that it is for."""

    app: str
    message: Message
    context: Context


Answer = tuple[Message, RecordDict]
Workers = Pool[Delivery, Answer]


def load(reference: str) -> Any:
    """The object that ``package.module:name`` names."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def make_pool(
    app: str, run_config: Mapping[str, Scalar], workers: int, places: list[dict[str, str]] | None = None
) -> Workers:
    """Workers for clients.

    Args:
        app: Reference to the ClientApp.
        run_config: The run's; workers load its model and data before the first message if the app is the product's own.
        workers: Processes at once.
        places: Environment variables of each.
    """
    prepare: Callable[[], None] = partial(_warm_up, dict(run_config)) if app == CLIENT else identify
    return Pool(deliver, workers, environment={}, places=places or (), prepare=prepare, preload=LIBRARIES)


class WorkerGrid(InProcessGrid):
    """Hands messages to worker processes, and collects their replies.

    Args:
        app: Reference to the ClientApp.
        num_nodes: See `InProcessGrid`.
        run_config: See `InProcessGrid`.
        pool: From `make_pool`.
    """

    def __init__(self, app: str, num_nodes: int, run_config: dict[str, Scalar], pool: Workers) -> None:
        loaded: ClientApp = load(app)
        super().__init__(loaded, num_nodes, run_config)
        self._reference, self._pool = app, pool

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Work on all messages, and return when all are answered."""
        return self._deliver(list(messages), None)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The replies that come in time; a worker that is still at a message then is ended."""
        return self.pull_messages(self._deliver(list(messages), timeout))

    def _deliver(self, messages: list[Message], timeout: float | None) -> list[str]:
        if all(message.metadata.message_type == "query" for message in messages):
            return list(super().push_messages(messages))  # answered at once, while the workers still start
        tasks = [
            Delivery(self._reference, message, self._contexts[message.metadata.dst_node_id]) for message in messages
        ]
        ids = {id(task): f"{self._sent}-{number}" for number, task in enumerate(tasks)}
        self._sent += 1

        what, done = messages[0].metadata.message_type.rpartition(".")[2], 0

        def on_tick(running: list[Delivery]) -> None:
            activity.tell(what, done, len(tasks), (int(t.context.node_config["partition-id"]) for t in running))

        def on_done(task: Delivery, answer: Answer | Died) -> None:
            nonlocal done
            done += 1
            if isinstance(answer, Died):
                log.warning("client %s: %s", task.context.node_config["partition-id"], answer.reason)
                self._replies[ids[id(task)]] = failure(task.message, answer.reason)
            else:
                self._replies[ids[id(task)]], task.context.state = answer

        self._pool.run(tasks, on_done, on_tick, timeout=math.inf if timeout is None else timeout)
        return list(ids.values())


def deliver(delivery: Delivery) -> Answer:
    """In a worker: the ClientApp's reply, and what its node keeps until the next message."""
    identify()
    reply = handle(load(delivery.app), delivery.message, delivery.context)
    return reply, delivery.context.state


def _warm_up(run_config: dict[str, Scalar]) -> None:
    """Load model and data while the server loads its own; round 1 meets the same problem, and tells the server."""
    from bora_fl.client.site import site

    identify()
    try:
        site(parse(run_config)).model()
    except Exception as error:
        log.debug("the warm-up failed: %s", error)


def places(clients: int, cores: int, gpus: int, cpus_per_client: int, gpus_per_client: float) -> list[dict[str, str]]:
    """The workers that fit on a machine, as the environment of each.

    Args:
        clients: Number of clients; there is no use for more workers.
        cores: Of the machine.
        gpus: Of the machine.
        cpus_per_client: Cores of a worker.
        gpus_per_client: GPUs of a worker, or its share of one. 0: it sees none.

    Raises:
        ConfigError: If not even one fits.
    """
    if cpus_per_client > cores:
        raise ConfigError(f"--cpus {cpus_per_client}: this machine has {cores} cores; lower it")
    if gpus_per_client > gpus:
        raise ConfigError(f"--gpus {gpus_per_client:g}: this machine has {gpus} GPUs; lower it, or leave it out")
    if 1 < gpus_per_client != int(gpus_per_client):
        raise ConfigError(f"--gpus {gpus_per_client:g}: write a share of one GPU, or a whole number of GPUs")
    count = min(clients, cores // cpus_per_client)
    if gpus_per_client == 0:
        visible = [""] * count
    elif gpus_per_client < 1:
        a_gpu = int(1 / gpus_per_client + 1e-9)
        visible = [str(place // a_gpu) for place in range(min(count, a_gpu * gpus))]
    else:
        width = int(gpus_per_client)
        visible = [
            ",".join(str(gpu) for gpu in range(place * width, (place + 1) * width))
            for place in range(min(count, gpus // width))
        ]
    return [grant(cpus_per_client, gpus_per_client) | {"CUDA_VISIBLE_DEVICES": devices} for devices in visible]
