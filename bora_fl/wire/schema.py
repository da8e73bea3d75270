"""Names and version of the wire, apart from tensors: what a process that only passes messages on can import."""

from flwr.app import ConfigRecord, RecordDict

SCHEMA = 2
STATE, FOLDS, INSTRUCTION, REPLY, METRICS = "state", "folds", "instruction", "reply", "metrics"


def refusal(reason: str, *, folds_held: int | None = None) -> RecordDict:
    """A reply of a site that could not do what it was asked.

    Args:
        reason: In words, for the server's log and metrics.
        folds_held: The newest fold version the site holds, if folds were what it lacked.
    """
    reply = ConfigRecord({"schema": SCHEMA, "refused": reason})
    if folds_held is not None:
        reply["folds-held"] = folds_held
    return RecordDict({REPLY: reply})
