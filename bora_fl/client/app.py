"""The Flower ClientApp: handlers that only translate, and leave the work to the site's worker where there is one."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from bora_fl.client.identity import ClientIdentity
from bora_fl.client.worker.address import WorkerSettings
from bora_fl.config import parse
from bora_fl.wire.schema import REPLY, SCHEMA, refusal

if TYPE_CHECKING:
    from bora_fl.client.job import Kind

log = logging.getLogger(__name__)

app = ClientApp()


def _answer(message: Message, handle: Callable[[], RecordDict]) -> Message:
    """Reply with the handler's content, or with the reason why there is none: the server logs it and goes on."""
    try:
        content = handle()
    except Exception as error:  # whatever went wrong at this site must reach the server in words
        log.exception("the message could not be worked on at this site")
        content = refusal(f"{type(error).__name__}: {error}")
    return Message(content, reply_to=message)


def _work(kind: "Kind", content: RecordDict, context: Context) -> RecordDict:
    """Train or evaluate, at the site's worker if the node config names one, else in this process."""
    worker = WorkerSettings.read(context.node_config)
    if worker is None:
        from bora_fl.client.job import perform

        return perform(kind, content, context)
    from bora_fl.client.worker.stub import hand_over, log_progress

    log_progress()
    return hand_over(worker, kind, content, context, parse(context.run_config).strategy.timeout)


@app.query()
def identify(message: Message, context: Context) -> Message:
    """Say which partition this node serves."""

    def handle() -> RecordDict:
        who = ClientIdentity.read(context.node_config, context.node_id)
        reply = ConfigRecord({"schema": SCHEMA, "partition": who.partition, "num-partitions": who.num_partitions})
        return RecordDict({REPLY: reply})

    return _answer(message, handle)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the received adapter and reply with what the strategy shares."""
    settings = parse(context.run_config)
    if not settings.privacy.secure_aggregation:
        return _answer(message, lambda: _work("train", message.content, context))
    from bora_fl.client.secure_aggregation import answer

    try:
        content = answer(message, context, settings, lambda inner: _work("train", inner.content, context))
    except Exception as error:  # to the protocol, a site that cannot go on is one that has vanished
        log.exception("the round failed at this site")
        reason = f"{type(error).__name__}: {error}"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received adapter on the client's held-out part."""
    return _answer(message, lambda: _work("evaluate", message.content, context))
