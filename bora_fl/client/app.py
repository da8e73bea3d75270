"""The Flower ClientApp: handlers that only translate, and leave the work to the site's worker where there is one."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from bora_fl.client.identity import ClientIdentity
from bora_fl.client.refusing import refuse
from bora_fl.client.worker.address import WorkerSettings
from bora_fl.config import parse
from bora_fl.wire.refusals import IN_CLEAR, Code, Refused, refuse_as
from bora_fl.wire.schema import INSTRUCTION, asked_under_masks, refusal, roll_call

if TYPE_CHECKING:
    from bora_fl.config import Settings
    from bora_fl.wire.schema import Kind

app = ClientApp()


def answer(message: Message, handle: Callable[[], RecordDict]) -> Message:
    """Reply with the handler's content, or with a refusal. Nothing is raised: Flower would send the error's text."""
    if INSTRUCTION not in (sent := message.content.config_records) and "server-round" in sent.get("config", {}):
        # Of a strategy of Flower's own, which logs the text of an error and ends at a reply in another form than its.
        return _error(message, Refused(Code.STRATEGY_FOREIGN))
    try:
        content = handle()
    except Exception as error:
        content = refusal(refuse(error))
    return Message(content, reply_to=message)


def _error(message: Message, error: Exception) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, refuse(error).line()), reply_to=message)


def _settings(context: Context) -> "Settings":
    with refuse_as(Code.RUN_CONFIG_INVALID):
        return parse(context.run_config)


def _work(kind: "Kind", content: RecordDict, context: Context) -> RecordDict:
    """Do it at the site's worker if the node config names one, else in this process."""
    with refuse_as(Code.NODE_CONFIG_INVALID):
        worker = WorkerSettings.read(context.node_config)
    if worker is None:
        from bora_fl.client.job import perform

        return perform(kind, content, context)
    from bora_fl.client.worker.stub import hand_over, log_progress

    log_progress()
    return hand_over(worker, kind, content, context, _settings(context).strategy.timeout)


def _in_clear(kind: "Kind", content: RecordDict, context: Context) -> RecordDict:
    """Do it, unless replies are to be masked."""
    if _settings(context).privacy.secure_aggregation:
        raise Refused(Code.PROTOCOL_MISMATCH, IN_CLEAR)
    return _work(kind, content, context)


@app.query()
def identify(message: Message, context: Context) -> Message:
    """Say which partition this node serves, and what its site is called."""

    def handle() -> RecordDict:
        who = ClientIdentity.read(context.node_config, context.node_id)
        return roll_call(who.partition, who.num_partitions, who.name)

    return answer(message, handle)


@app.query("head_statistics")
def head_statistics(message: Message, context: Context) -> Message:
    """Sum up the features that the classification head reads."""
    return answer(message, lambda: _in_clear("head-statistics", message.content, context))


@app.query("head_losses")
def head_losses(message: Message, context: Context) -> Message:
    """Evaluate several heads on the client's held-out part."""
    return answer(message, lambda: _in_clear("head-losses", message.content, context))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the received adapter and reply with what the strategy shares."""
    try:
        settings = _settings(context)
    except Exception as error:
        return Message(refusal(refuse(error)), reply_to=message)
    if not settings.privacy.secure_aggregation:
        return answer(message, lambda: _work("train", message.content, context))
    try:
        from bora_fl.client import secure_aggregation

        def work(inner: Message) -> RecordDict:
            return _work(asked_under_masks(inner.content), inner.content, context)

        content = secure_aggregation.answer(message, context, settings, work)
    except Exception as error:  # to the protocol, a site that cannot go on is one that has vanished
        return _error(message, error)
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received adapter on the client's held-out part."""
    return answer(message, lambda: _work("evaluate", message.content, context))
