"""Who a client is, by the node config of its SuperNode."""

from collections.abc import Mapping
from dataclasses import dataclass

from bora_fl.config import Scalar
from bora_fl.wire.refusals import Code, Refused, refuse_as


@dataclass(frozen=True)
class ClientIdentity:
    """Who a client is: its partition, out of how many, and the largest rank it can train (0: the federation's)."""

    partition: int
    num_partitions: int
    max_rank: int = 0

    @classmethod
    def read(cls, node_config: Mapping[str, Scalar], node_id: int) -> "ClientIdentity":
        """From a SuperNode's node config.

        Raises:
            Refused: If partition-id or num-partitions is missing, or one is no number.
        """
        if "partition-id" not in node_config or "num-partitions" not in node_config:
            raise Refused(
                Code.NODE_CONFIG_INVALID,
                f"node {node_id} has no partition-id and num-partitions; start the SuperNode with "
                '--node-config "partition-id=0 num-partitions=3"',
            )
        with refuse_as(Code.NODE_CONFIG_INVALID):
            return cls(
                int(node_config["partition-id"]), int(node_config["num-partitions"]), int(node_config.get("rank", 0))
            )
