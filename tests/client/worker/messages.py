"""Messages and contexts for a worker whose training is a stand-in."""

from flwr.app import ConfigRecord, Context, RecordDict

from bora_fl.wire.schema import INSTRUCTION


def context(partition: int = 0, **run_config) -> Context:
    return Context(1, partition + 2, {"partition-id": partition, "num-partitions": 3}, RecordDict(), run_config)


def content(round: int = 1) -> RecordDict:
    return RecordDict({INSTRUCTION: ConfigRecord({"round": round})})
