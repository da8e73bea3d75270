"""A client's part of secure aggregation: Flower's SecAgg+ around a round, so that the server sees the sum alone.

What is masked is the update of the shared parts (trained minus received) behind the client's weight, with the training
loss at the end, as far as it is within the range that is masked; or, where the head is asked for, the sums that it is
solved from, or its losses.
Whatever else a reply holds is left out: examples, timings, ε. A client that cannot take part raises, and the protocol
goes on as if it had vanished.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np
from flwr import common
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common import FitRes, NDArray, NDArrays, Parameters, Status, ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, RECORD_KEY_STATE, Key, Stage
from flwr.compat.common.recorddict_compat import fitres_to_recorddict
from torch import Tensor

from bora_fl.client.refusing import require_done
from bora_fl.config import Settings
from bora_fl.heads import ClassSums
from bora_fl.privacy import masks
from bora_fl.wire.records import from_arrays, part_of, read_message
from bora_fl.wire.refusals import IN_CLEAR, Code, Refused, refuse_as
from bora_fl.wire.schema import HEADS, METRICS, STATE, Kind, asked_under_masks

protocol = import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")  # its package hides it behind a function
vars(protocol)["pseudo_rand_gen"] = masks.expand


def answer(message: Message, context: Context, settings: Settings, work: Callable[[Message], RecordDict]) -> RecordDict:
    """Take the protocol's next step; in one of its four a round is trained.

    Args:
        message: The server's message of one of the protocol's stages.
        context: Keeps the client's keys between the stages.
        settings: The run's settings.
        work: Does what the protocol's third message asks for, and returns its plain reply.

    Returns:
        The reply: keys, encrypted shares, the masked update, or shares to unmask the sum.

    Raises:
        Refused: If the message is out of the protocol's order, the site refuses, or the update cannot be masked.
    """
    if RECORD_KEY_CONFIGS not in message.content.config_records:
        raise Refused(Code.PROTOCOL_MISMATCH, IN_CLEAR)
    with refuse_as(Code.PROTOCOL_MISMATCH):
        _require_one_secret_each(message.content.config_records[RECORD_KEY_CONFIGS], context, message)

    def done(inner: Message, _: Context) -> Message:
        kind = asked_under_masks(inner.content)
        if kind == "train":
            sent = read_message(inner.content, context.state)[1]  # before training, which replaces what is kept
            content = _update(require_done(work(inner)), sent, settings)
        else:
            content = _for_the_head(require_done(work(inner)), settings, kind)
        return Message(content, reply_to=inner)

    with refuse_as(Code.PROTOCOL_MISMATCH):
        reply = protocol.secaggplus_mod(message, context, done).content
    masked: ConfigRecord = reply.config_records[RECORD_KEY_CONFIGS]
    # The protocol leaves the weight and the metrics in the clear beside the masked vector.
    content = _result([], 1) if reply.metric_records else RecordDict()
    content.config_records[RECORD_KEY_CONFIGS] = masked
    return content


def _require_one_secret_each(asked: ConfigRecord, context: Context, message: Message) -> None:
    """Refuse what would give the server both secrets of a client: its own mask's, and those it shares with others.

    Whoever has both has the client's update. A client tells a share of one of them, of each other client, so that the
    server never has enough shares of both where these are those of more than half.

    Raises:
        Refused: If shares of half of the clients are enough, or a client is said to be there and not to be there, or
            this one not to be there, or is named that sent no shares, or named twice.
    """
    values: Mapping[str, Any] = asked
    if values[Key.STAGE] == Stage.SETUP:
        if 2 * values[Key.THRESHOLD] <= values[Key.SHARE_NUMBER] or values[Key.THRESHOLD] < 2:
            text = f"shares of {values[Key.THRESHOLD]} of {values[Key.SHARE_NUMBER]} clients would be enough"
            raise Refused(Code.PROTOCOL_MISMATCH, text)
    elif values[Key.STAGE] == Stage.COLLECT_MASKED_VECTORS:
        sources = values[Key.SOURCE_LIST]
        if len(set(sources)) < len(sources) or message.metadata.dst_node_id in sources:
            raise Refused(Code.PROTOCOL_MISMATCH, "a client's shares were sent twice, or are this client's own")
    elif values[Key.STAGE] == Stage.UNMASK:
        there, gone = values[Key.ACTIVE_NODE_ID_LIST], values[Key.DEAD_NODE_ID_LIST]
        kept: Mapping[str, Any] = context.state.config_records.get(RECORD_KEY_STATE, ConfigRecord())
        named = [*there, *gone]
        known = set(kept.get("rd_seed_share_dict:K", []))
        if len(set(named)) < len(named) or message.metadata.dst_node_id not in there or not set(named) <= known:
            text = f"{there} are to be there and {gone} not to be there, which are not those that sent their shares"
            raise Refused(Code.PROTOCOL_MISMATCH, text)


def _for_the_head(reply: RecordDict, settings: Settings, kind: Kind) -> RecordDict:
    """Sums over the client's examples, in units of ``privacy.max-examples``; every client has weight 1."""
    most = settings.privacy.max_examples
    if kind == "head-statistics":
        tensors, several = from_arrays(reply.array_records[HEADS]), settings.model.kind.several
        vector = ClassSums.from_tensors(tensors, *tensors["sums"].shape, several=several).to_vector().numpy()
    else:
        metrics = reply.metric_records[METRICS]
        examples = int(metrics["eval-examples"])  # type: ignore[arg-type]
        losses = np.array(metrics["head-losses"], dtype=np.float64)
        vector = np.append(losses * examples, examples)
    _require_in_range(vector / most, settings.privacy.clipping_range, "the head's sums over privacy.max-examples")
    return _result([vector / most], 1)


def _update(reply: RecordDict, before: Mapping[str, Tensor], settings: Settings) -> RecordDict:
    """The weight and the vector that the protocol masks."""
    privacy = settings.privacy
    after = from_arrays(reply.array_records[STATE])
    metrics = reply.metric_records[METRICS]
    update: NDArrays = []
    for name in sorted(after):
        if part_of(name) == "scaling":
            continue
        if after[name].shape != before[name].shape:
            raise Refused(
                Code.RANK_MISMATCH,
                f"{name} has shape {tuple(after[name].shape)}, the federation's {tuple(before[name].shape)}: masked "
                "updates are summed entry by entry, so all clients need the federation's rank",
            )
        update.append((after[name].double() - before[name].double()).numpy())
    for entries in update:
        _require_in_range(entries, privacy.clipping_range, "the update; or lower train.learning-rate")
    weight = int(metrics["num-examples"]) if settings.strategy.weighting == "examples" else 1  # type: ignore[arg-type]
    if weight > privacy.max_examples and settings.strategy.weighting == "examples":
        raise Refused(
            Code.WEIGHT_OUT_OF_RANGE,
            f"{weight} examples with privacy.max-examples = {privacy.max_examples}: the masked weight would overflow; "
            "raise it, or set strategy.weighting to uniform",
        )
    loss = min(float(metrics.get("train-loss", 0.0)), privacy.clipping_range)  # type: ignore[arg-type]
    update.append(np.array([loss]))
    return _result(update, weight)


def _require_in_range(entries: NDArray, clipping_range: float, of: str) -> None:
    largest = float(np.abs(entries).max(initial=0.0))
    if not largest <= clipping_range:
        raise Refused(
            Code.UPDATE_OUT_OF_RANGE,
            f"an entry is {largest:.3g} with privacy.clipping-range = {clipping_range:g}: cut to that it would bias "
            f"the sum, and no one could tell; raise it for {of}",
        )


def _result(update: NDArrays, weight: int) -> RecordDict:
    parameters = ndarrays_to_parameters(update) if update else Parameters([], "numpy.ndarray")
    return fitres_to_recorddict(FitRes(Status(common.Code.OK, ""), parameters, weight, {}), keep_input=False)
