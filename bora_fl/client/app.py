"""The Flower ClientApp: handlers that only translate."""

import logging
from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from bora_fl.client.round import ClientIdentity, MissingFoldsError, evaluate_round, train_round
from bora_fl.client.site import site
from bora_fl.config import parse
from bora_fl.records import METRICS, REPLY, SCHEMA, refusal

log = logging.getLogger(__name__)

app = ClientApp()


def _answer(message: Message, context: Context, handle: Callable[[ClientIdentity], RecordDict]) -> Message:
    """Reply with the handler's content, or with the reason why there is none: the server logs it and goes on."""
    try:
        content = handle(ClientIdentity.read(context.node_config, context.node_id))
    except MissingFoldsError as error:
        content = refusal(str(error), folds_held=error.held)
    except Exception as error:  # whatever went wrong at this site must reach the server in words
        log.exception("the round failed at this site")
        content = refusal(f"{type(error).__name__}: {error}")
    return Message(content, reply_to=message)


@app.query()
def identify(message: Message, context: Context) -> Message:
    """Say which partition this node serves."""

    def handle(who: ClientIdentity) -> RecordDict:
        reply = ConfigRecord({"schema": SCHEMA, "partition": who.partition, "num-partitions": who.num_partitions})
        return RecordDict({REPLY: reply})

    return _answer(message, context, handle)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the received adapter and reply with what the strategy shares."""

    def handle(who: ClientIdentity) -> RecordDict:
        return train_round(site(parse(context.run_config)), message.content, who, context.state)

    return _answer(message, context, handle)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received adapter on the client's held-out part."""

    def handle(who: ClientIdentity) -> RecordDict:
        metrics = evaluate_round(site(parse(context.run_config)), message.content, who, context.state)
        return RecordDict({METRICS: MetricRecord(dict(metrics))})

    return _answer(message, context, handle)
