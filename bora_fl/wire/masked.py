"""The server's checks of replies in secure aggregation's protocol, whose workflow in Flower takes them on trust.

A reply that is none counts as an error of its node, which drops out: one client must neither end the run nor make the
others drop out, as a key twice or a packet too few would. What is inside the masks no check can see.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from flwr.app import RecordDict
from flwr.common import Code as FitCode
from flwr.common import FitRes, Parameters, Status, bytes_to_ndarray
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common.recorddict_compat import fitres_to_recorddict
from flwr.supercore.primitives.asymmetric import bytes_to_public_key

from bora_fl.wire.replies import RejectedReplyError, require_no_refusal


class MaskedReplies:
    """Checks the replies of one round of the protocol, stage by stage.

    Args:
        shapes: Of the arrays that clients mask.
        modulus: What masked entries are below.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], modulus: int) -> None:
        self._shapes, self._modulus = [(1,), *shapes], modulus  # the protocol puts the weight before the vector
        self._keys: set[bytes] = set()

    def read(self, node: int, content: RecordDict, asked: Mapping[str, Any]) -> RecordDict:
        """The reply, less what is not of the protocol.

        Args:
            node: Whose it is.
            content: Its content.
            asked: The protocol's record of the message that it answers.

        Raises:
            RejectedReplyError: If it is no reply to that message.
        """
        require_no_refusal(node, content)
        stage = str(asked[Key.STAGE])
        try:
            reply: Mapping[str, Any] = content.config_records[RECORD_KEY_CONFIGS]
            right = getattr(self, f"_{stage}")(node, reply, asked)
        except Exception:  # whatever a client sends must not end the run
            right = False
        if not right:
            raise RejectedReplyError(node, f"no reply to stage {stage} of secure aggregation's protocol")
        masked = FitRes(Status(FitCode.OK, ""), Parameters([], ""), 1, {})
        found = fitres_to_recorddict(masked, False) if stage == Stage.COLLECT_MASKED_VECTORS else RecordDict()
        found.config_records[RECORD_KEY_CONFIGS] = content.config_records[RECORD_KEY_CONFIGS]
        return found

    def _setup(self, node: int, reply: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
        """Two keys that nobody has sent yet."""
        keys = {reply[Key.PUBLIC_KEY_1], reply[Key.PUBLIC_KEY_2]}
        parsed = [bytes_to_public_key(key) for key in keys]
        right = all(isinstance(k, EllipticCurvePublicKey) and isinstance(k.curve, SECP384R1) for k in parsed)
        if not right or len(keys - self._keys) != 2:
            return False
        self._keys |= keys
        return True

    def _share_keys(self, node: int, reply: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
        """A packet for each of the others."""
        others = [int(name) for name in asked if name not in (Key.STAGE, str(node))]
        return sorted(reply[Key.DESTINATION_LIST]) == sorted(others) and _all_bytes(
            reply[Key.CIPHERTEXT_LIST], len(others)
        )

    def _collect_masked_vectors(self, node: int, reply: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
        """The arrays that were asked for, of whole numbers below the modulus."""
        arrays = [bytes_to_ndarray(array) for array in reply[Key.MASKED_PARAMETERS]]
        whole = all(a.dtype == np.int64 and bool(((a >= 0) & (a < self._modulus)).all()) for a in arrays)
        return whole and [a.shape for a in arrays] == self._shapes

    def _unmask(self, node: int, reply: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
        """A share about each of those that were named."""
        named = [*asked[Key.ACTIVE_NODE_ID_LIST], *asked[Key.DEAD_NODE_ID_LIST]]
        return sorted(reply[Key.NODE_ID_LIST]) == sorted(named) and _all_bytes(reply[Key.SHARE_LIST], len(named))


def _all_bytes(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(isinstance(value, bytes) for value in values)
