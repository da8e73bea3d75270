"""A registered site that answers for another one, at the code that Flower's SuperLink runs."""

from copy import deepcopy

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import HttpGrid
from flwr.superlink.servicer.fleet.fleet_handlers import push_messages

from bora_fl.strategies.exchange import exchange
from bora_fl.wire.schema import REPLY


class SuperLink(HttpGrid):
    """Flower's grid over Flower's state of a SuperLink, without the network between."""

    def __init__(self) -> None:
        self.state = InMemoryLinkState(NoOpFederationManager(), ObjectStoreFactory().store())
        run = self.state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, None, TaskType.SERVER_APP)
        (task,) = self.state.task_store
        self.state.claim_task(task)
        self.state.activate_task(task)
        self.node, self._run = Node(node_id=SUPERLINK_NODE_ID), Run.create_empty(run)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run, SUPERLINK_NODE_ID
        self.sites = [self.state.create_node("owner", "owner", key, 30.0) for key in (b"one", b"two")]
        for site in self.sites:
            self.state.activate_node(site, 30.0)

    def close(self) -> None:
        """There is no connection."""

    def _try_push_messages(self, run_id: int, messages: list[Message]) -> list[str | None]:
        self.sent = {m.metadata.dst_node_id: m for m in deepcopy(messages)}
        return [self.state.store_message_ins(message) for message in messages]


def forged(asked: Message, victim: int) -> Message:
    """What the victim was asked, as far as a site can tell from what itself was asked and the victim's number."""
    metadata = deepcopy(asked.metadata)
    metadata.__dict__["_dst_node_id"] = victim
    guess = Message(asked.content, dst_node_id=victim, message_type=metadata.message_type)
    guess.metadata.__dict__.update(metadata.__dict__, _message_id="")
    guess.metadata.__dict__["_message_id"] = guess.object_id
    return guess


def answer(link: SuperLink, asked: Message, sender: int) -> bool:
    """Push a reply over the fleet API as `sender`; whether the SuperLink has it then."""
    reply = Message(RecordDict({REPLY: ConfigRecord({"round": 1})}), reply_to=asked)
    reply.metadata.__dict__["_src_node_id"] = asked.metadata.dst_node_id
    reply.metadata.__dict__["_message_id"] = reply.object_id
    tree, bare = get_object_tree(reply), message_to_proto(reply)
    bare.content.Clear()
    push_messages(
        PushMessagesRequest(node=Node(node_id=sender), messages_list=[bare], message_object_trees=[tree]), link.state
    )
    return reply.metadata.message_id in link.state.message_res_store


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> SuperLink:
    link = SuperLink()
    monkeypatch.setattr("bora_fl.strategies.arrivals.Arrivals.pull", lambda self, ids: [])
    content = RecordDict({"config": ConfigRecord({"round": 1})})
    messages = [Message(content, dst_node_id=site, message_type="train") for site in link.sites]
    moment = messages[0].metadata.created_at  # which a site can try out
    for message in messages:
        message.metadata.__dict__["_created_at"] = moment
    exchange(link, messages, 0.0)
    return link


def test_a_site_answers_for_itself(asked: SuperLink):
    liar, _ = asked.sites
    assert answer(asked, asked.sent[liar], liar)


def test_the_superlink_would_take_another_site_s_word_for_it(asked: SuperLink):
    liar, victim = asked.sites
    assert answer(asked, asked.sent[victim], liar), "if Flower compares the two, the random group can go"


def test_a_site_cannot_tell_what_message_another_was_sent(asked: SuperLink):
    liar, victim = asked.sites
    guess = forged(asked.sent[liar], victim)
    assert not answer(asked, guess, liar)
    known = deepcopy(guess)
    known.metadata.group_id = asked.sent[victim].metadata.group_id
    known.metadata.__dict__["_message_id"] = ""
    assert known.object_id == asked.sent[victim].metadata.message_id, "nothing else keeps it from knowing"
