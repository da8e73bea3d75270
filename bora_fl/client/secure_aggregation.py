"""A client's part of secure aggregation: Flower's SecAgg+ around a round, so that the server sees the sum alone.

What is masked is the update of the shared parts (trained minus received) behind the client's weight,
with the training loss at the end. Whatever else a reply holds is left out: examples, timings, ε. A client that cannot
take part raises, and the protocol goes on as if it had vanished.
"""

from collections.abc import Callable
from importlib import import_module

import numpy as np
from flwr import common
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common import FitRes, NDArrays, Parameters, Status, ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS
from flwr.compat.common.recorddict_compat import fitres_to_recorddict

from bora_fl.client.refusing import require_done
from bora_fl.config import Settings
from bora_fl.privacy import masks
from bora_fl.wire.records import from_arrays, part_of
from bora_fl.wire.refusals import Code, Refused, refuse_as
from bora_fl.wire.schema import METRICS, STATE

protocol = import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")  # its package hides it behind a function
vars(protocol)["pseudo_rand_gen"] = masks.expand


def answer(
    message: Message, context: Context, settings: Settings, train: Callable[[Message], RecordDict]
) -> RecordDict:
    """Take the protocol's next step; in one of its four a round is trained.

    Args:
        message: The server's message of one of the protocol's stages.
        context: Keeps the client's keys between the stages.
        settings: The run's settings.
        train: Trains the round that a message describes and returns its plain reply.

    Returns:
        The reply: keys, encrypted shares, the masked update, or shares to unmask the sum.

    Raises:
        Refused: If the message is out of the protocol's order, the site refuses, or the update cannot be masked.
    """
    if RECORD_KEY_CONFIGS not in message.content.config_records:
        raise Refused(
            Code.PROTOCOL_MISMATCH,
            "privacy.secure-aggregation = true, and the message is not of its protocol: nothing leaves this site in "
            "the clear; use the same setting on the server",
        )

    def trained(inner: Message, _: Context) -> Message:
        reply = require_done(train(inner))
        return Message(_to_mask(reply, inner.content, settings), reply_to=inner)

    with refuse_as(Code.PROTOCOL_MISMATCH):
        reply = protocol.secaggplus_mod(message, context, trained).content
    masked: ConfigRecord = reply.config_records[RECORD_KEY_CONFIGS]
    # The protocol leaves the weight and the metrics in the clear beside the masked vector.
    content = _result([], 1) if reply.metric_records else RecordDict()
    content.config_records[RECORD_KEY_CONFIGS] = masked
    return content


def _to_mask(reply: RecordDict, sent: RecordDict, settings: Settings) -> RecordDict:
    """The weight and the vector that the protocol masks."""
    privacy = settings.privacy
    before, after = from_arrays(sent.array_records[STATE]), from_arrays(reply.array_records[STATE])
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
    largest = max((float(np.abs(entries).max(initial=0.0)) for entries in update), default=0.0)
    if not largest <= privacy.clipping_range:
        raise Refused(
            Code.UPDATE_OUT_OF_RANGE,
            f"an entry of the update is {largest:.3g} with privacy.clipping-range = {privacy.clipping_range:g}: cut to "
            "that it would bias the sum, and no one could tell; raise it, or lower train.learning-rate",
        )
    weight = int(metrics["num-examples"]) if settings.strategy.weighting == "examples" else 1  # type: ignore[arg-type]
    if weight > privacy.max_examples and settings.strategy.weighting == "examples":
        raise Refused(
            Code.WEIGHT_OUT_OF_RANGE,
            f"{weight} examples with privacy.max-examples = {privacy.max_examples}: the masked weight would overflow; "
            "raise it, or set strategy.weighting to uniform",
        )
    update.append(np.array([float(metrics.get("train-loss", 0.0))]))  # type: ignore[arg-type]
    return _result(update, weight)


def _result(update: NDArrays, weight: int) -> RecordDict:
    parameters = ndarrays_to_parameters(update) if update else Parameters([], "numpy.ndarray")
    return fitres_to_recorddict(FitRes(Status(common.Code.OK, ""), parameters, weight, {}), keep_input=False)
