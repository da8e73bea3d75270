"""What a process that trains does with one message: in the ClientApp's own process, or in a site worker."""

import logging
from typing import Literal

from flwr.app import ConfigRecord, Context, MetricRecord, RecordDict

from bora_fl import preload as _preload  # noqa: F401  (before what else imports the large libraries)
from bora_fl.client.identity import ClientIdentity
from bora_fl.client.round import MissingFoldsError, OnStep, evaluate_round, train_round
from bora_fl.client.site import site
from bora_fl.config import parse
from bora_fl.paths import state_folder
from bora_fl.privacy.audit_log import AUDIT_LOG, AuditLogError, append
from bora_fl.wire.records import content_digest
from bora_fl.wire.schema import INSTRUCTION, METRICS, REPLY, refusal

log = logging.getLogger(__name__)

Kind = Literal["train", "evaluate"]


def perform(kind: Kind, content: RecordDict, context: Context, on_step: OnStep | None = None) -> RecordDict:
    """Train or evaluate as a message asks, and reply with the result, or with the reason why there is none.

    Args:
        kind: What the message asks for.
        content: The message's content.
        context: The node's; `context.state`, what the client keeps between rounds, is changed in place.
        on_step: Called between steps with what is being done, steps done, and steps in all. What it raises beyond
            `Exception` ends the work and passes through.

    Returns:
        The reply's content; a refusal if anything went wrong at this site, or if the site's audit log has no place for
        it, since nothing leaves unseen.
    """
    reply = _perform(kind, content, context, on_step)
    try:
        _record(kind, content, context, reply)
    except AuditLogError:
        log.exception("the reply stays here")
        return refusal("this site's audit log cannot be written, so nothing leaves it; its own log says why")
    return reply


def _record(kind: Kind, content: RecordDict, context: Context, reply: RecordDict) -> None:
    """Add to the site's audit log what is about to leave."""
    asked = content.config_records.get(INSTRUCTION, ConfigRecord())
    metrics = reply.metric_records.get(METRICS, MetricRecord())
    append(
        state_folder() / AUDIT_LOG,
        kind=kind,
        outcome="refused" if "refused" in reply.config_records.get(REPLY, ConfigRecord()) else "released",
        node=context.node_id,
        partition=str(context.node_config.get("partition-id", "")),
        run=str(asked.get("run-id", ""))[:64],
        round=str(asked.get("round", ""))[:20],
        charge={name: str(value) for name, value in metrics.items() if name.startswith("epsilon")},
        reply=content_digest(reply),
    )


def _perform(kind: Kind, content: RecordDict, context: Context, on_step: OnStep | None) -> RecordDict:
    try:
        who = ClientIdentity.read(context.node_config, context.node_id)
        here = site(parse(context.run_config))
        if kind == "train":
            return train_round(here, content, who, context.state, on_step)
        metrics = evaluate_round(here, content, who, context.state, on_step)
        return RecordDict({METRICS: MetricRecord(dict(metrics))})
    except MissingFoldsError as error:
        return refusal(str(error), folds_held=error.held)
    except Exception as error:  # whatever went wrong at this site must reach the server in words
        log.exception("the round failed at this site")
        return refusal(f"{type(error).__name__}: {error}")
