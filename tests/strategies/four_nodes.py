"""A made-up federation of four nodes behind a grid, one of which may be sick."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from bora_fl.blocks import BlockFactors
from bora_fl.state import AdapterState
from bora_fl.wire.records import reply_content
from bora_fl.wire.schema import INSTRUCTION, METRICS, REPLY, SCHEMA

ROUNDS, SICK = 2, 3  # the fourth node replies with garbage, to everything but the roll call
CONFIG = {
    "strategy.name": "refactor",
    "strategy.server-optimizer": "momentum",
    "strategy.residual": "carry",
    "strategy.residual-rank": 1,
    "strategy.fraction-evaluate": 1.0,
    "strategy.sweeps": 1,
    "adapter.rank": 2,
    "adapter.num-blocks": 2,
    "run.num-rounds": ROUNDS,
}


def adapter(seed: int) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    log = torch.randn(2, 2, 2, generator=g)
    layer = BlockFactors(
        torch.randn(4, 2, generator=g), (log / log.abs().mean()).exp(), torch.randn(2, 6, generator=g), 2.0
    )
    return AdapterState({"q": layer}, {"head.weight": torch.randn(3, 4, generator=g)})


def good_reply(content: RecordDict, seed: int) -> RecordDict:
    sent, number = adapter(0), content.config_records[INSTRUCTION]["round"]
    parts = frozenset({"A", "sigma", "B", "tensors"})
    metrics = {"num-examples": 10 + seed, "train-loss": 0.5, "partition": seed}
    return reply_content(adapter(100 * number + seed), sent, parts, number, metrics)


def evaluation(seed: int) -> RecordDict:
    metrics = {"eval-loss": 1.0 + seed, "eval-accuracy": 0.5, "eval-examples": 7, "partition": seed}
    return RecordDict({METRICS: MetricRecord(metrics)})


Garble = Callable[[RecordDict], Any]


class Grid:
    """Four nodes; the last one's replies pass through `garble`."""

    def __init__(self, garble: Garble = lambda content: content) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.garble = garble
        self.seen: list[Message] = []

    def get_node_ids(self) -> Iterable[int]:
        return [2, 3, 4, 5]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        sent = list(messages)
        self.seen += sent
        return [self.answer(message) for message in sent]

    def answer(self, message: Message) -> Message:
        partition = message.metadata.dst_node_id - 2
        if message.metadata.message_type == "query":
            hello = ConfigRecord({"schema": SCHEMA, "partition": partition, "num-partitions": 4})
            return Message(RecordDict({REPLY: hello}), reply_to=message)
        trains = message.metadata.message_type == "train"
        content = good_reply(message.content, partition) if trains else evaluation(partition)
        if partition == SICK:
            content = self.garble(content)
        return Message(content, reply_to=message)
