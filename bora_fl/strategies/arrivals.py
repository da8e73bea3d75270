"""Replies over a SuperLink as far as they have come, without waiting for one that is still on its way."""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)
from flwr.superlink.grid import HttpGrid

log = logging.getLogger(__name__)

CUT_OFF = "its reply was cut off, and the SuperLink has given it up"
STALLED = "its reply has not come on for so long that no more of it is expected; start its SuperNode again"
UNREADABLE = "its reply is no message"


@dataclass
class _Arriving:
    """A reply that a SuperNode has begun to send.

    Attributes:
        metadata: The reply's.
        missing: Ids of its objects that have not been pulled yet, in the order in which they are sent.
        contents: Id to object, of those that have.
        moved: When the last of them was, on the monotonic clock.
    """

    metadata: Metadata
    missing: list[str]
    contents: dict[str, bytes] = field(default_factory=dict)
    moved: float = field(default_factory=time.monotonic)


class Arrivals:
    """`HttpGrid.pull_messages` that never waits.

    A SuperLink tells of a reply once, when its SuperNode begins to send it; the objects that it consists of follow one
    by one. Flower's own call waits for these. Where they do not come, since the SuperLink was killed while they were
    sent, it waits for three minutes, with all other replies behind it. Here each look takes what is there, and the next
    one goes on with it. A SuperNode whose ClientApp dies while it hands over a reply sends the rest of that for ever.

    Args:
        grid: Flower's grid.
        stall: Seconds without another object, after which the rest of a reply is no longer expected.
    """

    def __init__(self, grid: HttpGrid, stall: float = 300.0) -> None:
        self._grid, self._stall = grid, stall
        self._arriving: dict[str, _Arriving] = {}

    def pull(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies that are whole by now, one after the other, and an error for each that never will be.

        Args:
            message_ids: Of the messages that have not been answered yet.
        """
        # The SuperLink has forgotten the messages of whose replies it has told, and would answer with errors.
        asked = set(message_ids)
        if unknown := asked - self._arriving.keys():
            told = self._grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=sorted(unknown)))
            for reply, tree in zip(told.messages_list, told.message_object_trees, strict=True):
                metadata, parts = metadata_from_proto(reply.metadata), iterate_object_tree(tree)
                ids = list(dict.fromkeys(part.object_id for part in parts))
                self._arriving[metadata.reply_to_message_id] = _Arriving(metadata, ids)
        for key in sorted(asked & self._arriving.keys()):
            reply = self._go_on(key)
            if reply is not None:
                yield reply

    def _go_on(self, key: str) -> Message | None:
        """Pull what has come of a reply since the last look; the reply, if that is all of it."""
        arriving, grid, run_id = self._arriving[key], self._grid, self._grid.run.run_id
        api = grid._runtime_client
        pull_object = make_pull_object_fn_protobuf(api.PullObject, grid.node, run_id)
        try:
            while arriving.missing:
                arriving.contents[arriving.missing[0]] = pull_object(arriving.missing[0])
                del arriving.missing[0]
                arriving.moved = time.monotonic()
        except ObjectUnavailableError:
            if time.monotonic() - arriving.moved < self._stall:
                return None
            del self._arriving[key]
            return make_message(metadata=arriving.metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, STALLED))
        except ObjectPullError:
            del self._arriving[key]
            return make_message(metadata=arriving.metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, CUT_OFF))
        del self._arriving[key]
        root = arriving.metadata.message_id
        received = ConfirmMessageReceivedRequest(node=grid.node, run_id=run_id, message_object_id=root)
        api.ConfirmMessageReceived(received)
        return _read(arriving)


def _read(arriving: _Arriving) -> Message:
    """The reply from its objects, or an error for what is no message.

    The SuperLink looks at the heads of objects alone: what they hold is the sender's word, whom the reply is from and
    what it answers included. For that the SuperLink's own word is taken.
    """
    metadata = arriving.metadata
    try:
        found: object = inflate_object_from_contents(metadata.message_id, arriving.contents)
    except Exception:  # whatever a client sends must not end the run
        log.warning("node %d: a reply cannot be read", metadata.src_node_id, exc_info=True)
        found = None
    if isinstance(found, Message) and found.has_error():
        return make_message(metadata=metadata, error=found.error)
    if isinstance(found, Message) and isinstance(found.content, RecordDict):
        return make_message(metadata=metadata, content=found.content)
    return make_message(metadata=metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, UNREADABLE))
