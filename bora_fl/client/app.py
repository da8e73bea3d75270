"""The Flower ClientApp: handlers that only translate."""

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from bora_fl.client.round import ClientIdentity, MissingFoldsError, evaluate_round, train_round
from bora_fl.client.site import site
from bora_fl.config import parse
from bora_fl.records import METRICS, REPLY, SCHEMA

app = ClientApp()


@app.query()
def identify(message: Message, context: Context) -> Message:
    """Say which partition this node serves."""
    who = ClientIdentity.read(context.node_config, context.node_id)
    reply = ConfigRecord({"schema": SCHEMA, "partition": who.partition, "num-partitions": who.num_partitions})
    return Message(RecordDict({REPLY: reply}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the received adapter and reply with what the strategy shares."""
    who = ClientIdentity.read(context.node_config, context.node_id)
    try:
        content = train_round(site(parse(context.run_config)), message.content, who, context.state)
    except MissingFoldsError as error:
        content = RecordDict({REPLY: ConfigRecord({"schema": SCHEMA, "folds-held": error.held})})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received adapter on the client's held-out part."""
    who = ClientIdentity.read(context.node_config, context.node_id)
    metrics = evaluate_round(site(parse(context.run_config)), message.content, who, context.state)
    return Message(RecordDict({METRICS: MetricRecord(metrics)}), reply_to=message)
