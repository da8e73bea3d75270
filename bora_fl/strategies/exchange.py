"""A round's messages out and its replies in, without waiting for a site that has lost its message."""

import logging
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeGuard

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from bora_fl.tracking import activity
from bora_fl.wire.schema import INSTRUCTION, SCHEMA

if TYPE_CHECKING:
    from flwr.superlink.grid import HttpGrid

log = logging.getLogger(__name__)

LOST = "it has lost the message or its reply: its SuperNode or the SuperLink was started again"


def hello() -> RecordDict:
    """What a question to a node carries; any node that runs answers it at once."""
    return RecordDict({INSTRUCTION: ConfigRecord({"schema": SCHEMA})})


def exchange(
    grid: Grid, messages: Iterable[Message], timeout: float, *, poll: float = 1.0, quiet: float = 60.0
) -> list[Message]:
    """Send messages, and return the replies that come in time: see `arriving`."""
    return list(arriving(grid, messages, timeout, poll=poll, quiet=quiet))


def arriving(
    grid: Grid, messages: Iterable[Message], timeout: float, *, poll: float = 1.0, quiet: float = 60.0
) -> Iterator[Message]:
    """Send messages, and yield the replies as they come in time, each with the node it is about as its source.

    A SuperLink hands a message out once. A SuperNode that is killed with one and started again is online and never
    answers it, so that Flower would wait until the time is over; and a SuperNode that cannot send a reply, since the
    SuperLink was killed meanwhile, drops it. But a SuperNode works on one message after the other:
    one that answers a later question has lost the earlier message. Who is silent is asked once nobody has answered for
    `quiet` seconds, and for as long as the answers so far took. Flower's simulations lose no message and work on
    several of a node's at once: they are not asked.

    Args:
        grid: Flower's grid.
        messages: One for each node.
        timeout: Seconds to wait.
        poll: Seconds between two looks for replies.
        quiet: Seconds without any reply, after which silent nodes are asked.
    """
    sent = list(messages)
    what = sent[0].metadata.message_type if sent else ""
    if not _over_a_superlink(grid):
        activity.tell(_words(what), 0, len(sent))
        yield from grid.send_and_receive(sent, timeout=timeout)
        return
    waiting: dict[str, Message] = {}
    answered = 0
    for message_id, message in zip(_push(grid, sent), sent, strict=True):
        if message_id is None:
            answered += 1
            yield _error(message, "the SuperLink did not take the message")
        else:
            waiting[message_id] = message
    from bora_fl.strategies.arrivals import Arrivals

    asked: dict[str, str] = {}
    pull = Arrivals(grid).pull
    started = heard = time.monotonic()
    while waiting and time.monotonic() - started < timeout:
        activity.tell(_words(what), answered, len(sent))
        idle: set[str] = set()
        for reply in pull([*waiting, *asked]):
            key = reply.metadata.reply_to_message_id
            if key in asked:
                about = asked.pop(key)
                idle |= {about} if reply.has_content() else set()
            elif key in waiting:
                answered += 1
                yield _about(waiting.pop(key), reply)
                heard = time.monotonic()
        for reply in pull(waiting) if idle else ():  # what they had to send was there before their answer
            if (key := reply.metadata.reply_to_message_id) in waiting:
                answered += 1
                yield _about(waiting.pop(key), reply)
                heard = time.monotonic()
        for key in sorted(idle & waiting.keys()):
            answered += 1
            yield _error(waiting.pop(key), LOST)
        if time.monotonic() - heard > max(quiet, heard - started):
            silent = [key for key in waiting if key not in asked.values()]
            nodes = [waiting[key].metadata.dst_node_id for key in silent]
            log.info("%d of %d nodes are silent", len(waiting), len(sent))
            questions = _push(grid, [Message(hello(), dst_node_id=node, message_type="query") for node in nodes])
            asked |= {question: key for question, key in zip(questions, silent, strict=True) if question is not None}
            heard = time.monotonic()
        if waiting:
            time.sleep(poll)


def _over_a_superlink(grid: Grid) -> TypeGuard["HttpGrid"]:
    """Whether messages go over a SuperLink; its module, with SQLAlchemy below it, is not imported to find out."""
    module = sys.modules.get("flwr.superlink.grid")
    return module is not None and isinstance(grid, module.HttpGrid)


def _words(message_type: str) -> str:
    return {"query": "wait for clients"}.get(message_type, message_type.rpartition(".")[2])


def _push(grid: Grid, messages: list[Message]) -> list[str | None]:
    """Message ids; None for what the SuperLink did not take, which may be everything if it is too large for it.

    A message's id is a digest of the message, and a SuperLink takes a reply for that of the node that it names, whoever
    sends it: a site that knows what another was asked could answer for it. A random group keeps the id from others.
    """
    for message in messages:
        message.metadata.group_id += f".{secrets.token_hex(16)}"
    ids: list[str | None] = list(grid.push_messages(messages))
    return ids or [None] * len(messages)


def _about(message: Message, reply: Message) -> Message:
    """The reply to a message; an error in the node's name."""
    return _error(message, reply.error.reason or "", reply.error.code) if reply.has_error() else reply


def _error(message: Message, reason: str, code: int = ErrorCode.MESSAGE_UNAVAILABLE) -> Message:
    """An error in a node's name; the SuperLink reports errors in its own."""
    return Message(Error(code, reason), reply_to=message)
