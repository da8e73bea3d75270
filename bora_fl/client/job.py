"""What a process that trains does with one message: in the ClientApp's own process, or in a site worker."""

import logging
from typing import Literal

from flwr.app import Context, MetricRecord, RecordDict

from bora_fl import preload as _preload  # noqa: F401  (before what else imports the large libraries)
from bora_fl.client.identity import ClientIdentity
from bora_fl.client.round import MissingFoldsError, OnStep, evaluate_round, train_round
from bora_fl.client.site import site
from bora_fl.config import parse
from bora_fl.wire.schema import METRICS, refusal

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
        The reply's content; a refusal if anything went wrong at this site.
    """
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
