"""The one place where an exception becomes a refusal: its text goes to the site's log, its code to the server."""

import logging

from flwr.app import ConfigRecord, RecordDict

from bora_fl.wire.refusals import Code, Refusal, Refused, code_of
from bora_fl.wire.schema import REPLY

log = logging.getLogger(__name__)


def refuse(error: Exception) -> Refusal:
    """Log an exception under a new error id, unless it has one, and return what may leave."""
    held = error.folds_held if isinstance(error, Refused) else None
    if isinstance(error, Refused) and error.error_id:
        return Refusal(error.code, error.error_id, held)
    made = Refusal(code_of(error), folds_held=held)
    log.error("error %s (%s): %s", made.error_id, made.code, error, exc_info=error)
    return made


def require_done(reply: RecordDict) -> RecordDict:
    """Return a reply that is a result.

    Raises:
        Refused: If it is a refusal, with its code and id.
    """
    record = reply.config_records.get(REPLY, ConfigRecord())
    if "refused" in record:
        raise Refused(Code.of(record["refused"]) or Code.INTERNAL_ERROR, error_id=str(record["error-id"]))
    return reply
