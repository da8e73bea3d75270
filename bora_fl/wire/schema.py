"""Names and version of the wire, apart from tensors: what a process that only passes messages on can import."""

from typing import Literal, get_args

from flwr.app import ConfigRecord, RecordDict

from bora_fl.wire.refusals import Refusal

SCHEMA = 3
Kind = Literal["train", "evaluate", "head-statistics", "head-losses"]
"""What a message may ask a site to work on."""
KINDS: tuple[Kind, ...] = get_args(Kind)
STATE, FOLDS, INSTRUCTION, REPLY, METRICS, HEADS = "state", "folds", "instruction", "reply", "metrics", "heads"
GRAMS = "grams"
SITE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}"
"""What a site may be called: it stands in the server's messages."""
HEAD = "head"
"""The record of a message that says which sums the head is to be solved from."""


def asked_under_masks(content: RecordDict) -> Kind:
    """What a message of secure aggregation asks for: its protocol knows one type of message only."""
    if HEAD in content.config_records:
        return "head-statistics"
    return "head-losses" if HEADS in content.array_records else "train"


def refusal(refused: Refusal) -> RecordDict:
    """A reply of a site that could not do what it was asked."""
    reply = ConfigRecord({"schema": SCHEMA, "refused": str(refused.code), "error-id": refused.error_id})
    if refused.folds_held is not None:
        reply["folds-held"] = refused.folds_held
    return RecordDict({REPLY: reply})


def roll_call(partition: int, num_partitions: int, name: str = "") -> RecordDict:
    """A reply to the question which partition a node serves: what its node config says."""
    reply = ConfigRecord({"schema": SCHEMA, "partition": partition, "num-partitions": num_partitions})
    if name:
        reply["name"] = name
    return RecordDict({REPLY: reply})
