"""Waiting for replies over a SuperLink that hands every message out once."""

import functools
import itertools
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import Node as Proto
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import (
    add_header_to_object_body,
    get_all_nested_objects,
    get_object_tree,
)
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from bora_fl.strategies.arrivals import CUT_OFF, STALLED, UNREADABLE, Arrivals
from bora_fl.strategies.exchange import LOST, exchange
from bora_fl.wire.schema import REPLY

Node = Callable[[str], str]
"""What became of a message of that kind: "answered", "at work", "gone", "lost", "sending" its reply object by object,
"cut off" meanwhile, or "given up" by the SuperLink then; of a node that lies, "garbled" bytes, "an array" in the place
of a message, "an array in it" in the place of its content, or an answer "as another" node to another message."""


class SuperLink(HttpGrid):
    """Nodes in memory: each works on one message after the other."""

    def __init__(self, nodes: dict[int, Node]) -> None:
        self.nodes, self.sent, self.numbers = nodes, {}, itertools.count()
        self.kinds: list[str] = []
        self.objects: dict[str, bytes | None] = {}  # of replies; None for one that has not come
        self.coming: dict[str, bytes] = {}  # what has come by the next look
        self.node, self._run = Proto(node_id=SUPERLINK_NODE_ID), Run.create_empty(1)

    @property
    def _runtime_client(self) -> "SuperLink":
        return self

    def close(self) -> None:
        """There is no connection."""

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        ids: list[str | None] = []
        for message in messages:
            self.kinds.append(message.metadata.message_type)
            name = f"m{next(self.numbers)}"
            message.metadata.__dict__["_message_id"] = name
            self.sent[name] = message
            ids.append(name)
        return ids

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:  # noqa: N802 - as in the protocol
        told = PullAppMessagesResponse()
        for name in request.message_ids:
            message = self.sent[name]
            fate = self.nodes[message.metadata.dst_node_id](message.metadata.message_type)
            if fate in ("at work", "lost"):
                continue
            reply = Message(RecordDict({REPLY: ConfigRecord({"round": 1})}), reply_to=message)
            if fate == "gone":
                reply = Message(Error(5, "node unavailable"), reply_to=message)
                reply.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
            reply.metadata.__dict__["_message_id"] = reply.object_id
            tree, root = get_object_tree(reply), reply.object_id
            parts = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
            parts |= {root: self.lie(fate, reply, parts[root], tree)}
            if fate == "sending":
                self.coming |= parts
            self.objects |= dict.fromkeys(parts) if fate in ("sending", "cut off") else parts
            if fate == "given up":
                del self.objects[reply.object_id]
            told.messages_list.append(message_to_proto(remove_content_from_message(reply)))
            told.message_object_trees.append(tree)
            del self.sent[name]  # it is told of once
        return told

    def lie(self, fate: str, reply: Message, truth: bytes, tree: ObjectTree) -> bytes:
        """What a SuperLink, which looks at no more than an object's head, hands on as a reply's first object."""
        array = Array(np.zeros(2, dtype=np.float32))
        if fate == "garbled":
            return add_header_to_object_body(b"\xff" * 9, reply)
        if fate == "an array":
            return array.deflate()
        if fate == "an array in it":
            self.objects[array.object_id] = array.deflate()
            tree.children.add(object_id=array.object_id)
            return truth.replace(reply.content.object_id.encode(), array.object_id.encode())
        if fate == "as another":
            victim = next(m for m in self.sent.values() if m.metadata.dst_node_id != reply.metadata.src_node_id)
            return Message(RecordDict({REPLY: ConfigRecord({"round": 1})}), reply_to=victim).deflate()
        return truth

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802
        content = self.objects.get(request.object_id, b"")
        if content is None and request.object_id in self.coming:
            self.objects[request.object_id] = self.coming.pop(request.object_id)
        there = {"object_found": request.object_id in self.objects, "object_available": content is not None}
        return PullObjectResponse(**there, object_content=content or b"")

    def ConfirmMessageReceived(self, request: ConfirmMessageReceivedRequest) -> None:  # noqa: N802
        assert self.objects[request.message_object_id]


@pytest.fixture(autouse=True)
def identity():
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def run(nodes: dict[int, Node], timeout: float = 5.0) -> tuple[dict[int, str], SuperLink]:
    grid = SuperLink(nodes)
    messages = [Message(RecordDict(), dst_node_id=node, message_type="train") for node in nodes]
    replies = exchange(grid, messages, timeout, poll=0.01, quiet=0.05)
    assert len(replies) == len({reply.metadata.src_node_id for reply in replies})
    return {m.metadata.src_node_id: m.error.reason if m.has_error() else "answered" for m in replies}, grid


def prompt(kind: str) -> str:
    return "answered"


def restarted(kind: str) -> str:
    """The message is lost, and what comes later is answered."""
    return "lost" if kind == "train" else "answered"


def slow(polls: int) -> Node:
    """At work for some polls, and only then free for another message."""
    left = itertools.count(polls, -1)
    return lambda kind: ("at work" if next(left) > 0 else "answered") if kind == "train" else "at work"


def test_prompt_nodes_are_asked_nothing():
    replies, grid = run({2: prompt, 3: prompt})
    assert replies == {2: "answered", 3: "answered"}
    assert grid.kinds == ["train", "train"]


@pytest.mark.parametrize("lie", ["garbled", "an array", "an array in it"])
def test_a_reply_that_is_no_message_is_that_nodes_alone(lie: str):
    replies, _ = run({2: lambda kind: lie, 3: prompt}, timeout=2.0)
    assert replies == {2: UNREADABLE, 3: "answered"}


def test_no_node_answers_for_another():
    """What the body of a reply says of who sends it, and of what it answers, is its sender's own word."""
    replies, _ = run({2: lambda kind: "as another", 3: slow(4)}, timeout=2.0)
    assert replies == {2: "answered", 3: "answered"}


def test_a_node_that_lost_its_message_is_not_waited_for():
    replies, grid = run({2: prompt, 3: restarted}, timeout=60.0)
    assert replies == {2: "answered", 3: LOST}
    assert grid.kinds.count("query") == 1


def test_a_slow_node_is_waited_for_and_asked_once():
    replies, grid = run({2: prompt, 3: slow(60)}, timeout=60.0)
    assert replies == {2: "answered", 3: "answered"}
    assert grid.kinds.count("query") == 1


def test_a_reply_that_arrives_in_the_middle_of_a_look_counts():
    looked = []

    def node(kind: str) -> str:
        if kind == "query":
            looked.append(kind)
        return "answered" if looked else "at work"

    assert run({2: node}, timeout=60.0)[0] == {2: "answered"}
    assert looked


def test_the_superlink_s_errors_bear_the_node_s_name():
    assert run({2: prompt, 3: lambda kind: "gone"})[0] == {2: "answered", 3: "node unavailable"}


def cut_off(kind: str) -> str:
    """The SuperLink was killed while it was sent the reply; the node has dropped it, and answers what comes later."""
    return "cut off" if kind == "train" else "answered"


def test_a_reply_that_was_cut_off_is_not_waited_for_and_holds_up_no_other():
    replies, grid = run({2: cut_off, 3: prompt, 4: slow(3)}, timeout=60.0)
    assert replies == {2: LOST, 3: "answered", 4: "answered"}
    assert grid.kinds.count("query") == 1


def test_the_timeout_ends_the_wait_for_a_reply_that_is_still_sent():
    assert run({2: lambda kind: "cut off", 3: prompt}, timeout=0.3)[0] == {3: "answered"}


def test_a_reply_that_the_superlink_has_given_up_is_an_error():
    assert run({2: lambda kind: "given up", 3: prompt}, timeout=60.0)[0] == {2: CUT_OFF, 3: "answered"}


def test_a_reply_that_comes_bit_by_bit_is_whole_in_the_end():
    replies, grid = run({2: lambda kind: "sending", 3: prompt}, timeout=60.0)
    assert replies == {2: "answered", 3: "answered"}
    assert grid.kinds == ["train", "train"]
    assert all(grid.objects.values())


def test_a_reply_that_does_not_come_on_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bora_fl.strategies.arrivals.Arrivals", functools.partial(Arrivals, stall=0.1))
    stuck = {2: lambda kind: "cut off" if kind == "train" else "at work", 3: prompt}
    assert run(stuck, timeout=60.0)[0] == {2: STALLED, 3: "answered"}


def test_messages_that_the_superlink_does_not_take_are_errors(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SuperLink, "push_messages", lambda self, messages: [])
    replies, _ = run({2: prompt, 3: prompt})
    assert replies == dict.fromkeys((2, 3), "the SuperLink did not take the message")


def test_the_timeout_ends_the_wait():
    assert run({2: prompt, 3: lambda kind: "at work"}, timeout=0.3)[0] == {2: "answered"}
