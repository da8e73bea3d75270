"""Who a client is, by the node config of its SuperNode."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from bora_fl.config import Scalar
from bora_fl.wire.refusals import Code, Refused, refuse_as
from bora_fl.wire.schema import SITE_NAME


@dataclass(frozen=True)
class ClientIdentity:
    """Who a client is.

    Attributes:
        partition: Its partition.
        num_partitions: Out of how many.
        max_rank: The largest rank it can train; 0 for the federation's.
        name: What the server's messages call its site, if it says so.
    """

    partition: int
    num_partitions: int
    max_rank: int = 0
    name: str = ""

    @classmethod
    def read(cls, node_config: Mapping[str, Scalar], node_id: int) -> "ClientIdentity":
        """From a SuperNode's node config.

        Raises:
            Refused: If partition-id or num-partitions is missing, one is no number, or the name cannot be used.
        """
        if "partition-id" not in node_config or "num-partitions" not in node_config:
            raise Refused(
                Code.NODE_CONFIG_INVALID,
                f"node {node_id} has no partition-id and num-partitions; start the SuperNode with "
                '--node-config "partition-id=0 num-partitions=3"',
            )
        name = str(node_config.get("name", ""))
        if name and not re.fullmatch(SITE_NAME, name):
            raise Refused(
                Code.NODE_CONFIG_INVALID,
                f"name = {name!r} in the node config: use up to 40 letters, digits, '.', '_' and '-'",
            )
        with refuse_as(Code.NODE_CONFIG_INVALID):
            partition, count = int(node_config["partition-id"]), int(node_config["num-partitions"])
            return cls(partition, count, int(node_config.get("rank", 0)), name)
