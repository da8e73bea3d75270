"""The server's checks of what comes off the wire: a reply passes all of them before any arithmetic, or is rejected."""

import math
import re
from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from bora_fl.blocks.gram import Kind, unpacked
from bora_fl.state import PARTS, AdapterState, flatten, unflatten
from bora_fl.wire.deltas import apply
from bora_fl.wire.records import from_arrays, part_of
from bora_fl.wire.refusals import explain
from bora_fl.wire.schema import GRAMS, HEADS, METRICS, REPLY, SCHEMA, SITE_NAME, STATE
from bora_fl.wire.updates import Coding

MOST_EXAMPLES, MOST_METRICS = 1e12, 64
MOST_NUMBER = 1e30
"""Beyond any metric that means something, and far from where sums of them overflow."""


class RejectedReplyError(ValueError):
    """A reply that is rejected.

    Attributes:
        node_id: The node it came from.
        reason: What was wrong with it.
        folds_held: The newest fold version its site holds, where it lacked folds.
    """

    def __init__(self, node_id: int, reason: str, folds_held: int | None = None) -> None:
        super().__init__(f"node {node_id}: {reason}")
        self.node_id, self.reason, self.folds_held = node_id, reason, folds_held


def _reply_record(message: Message) -> ConfigRecord:
    """The reply record of a message that is neither an error, nor a refusal, nor of another schema."""
    node = message.metadata.src_node_id
    if message.has_error():
        words = re.sub(r"\x1b\[[0-9;]*m", "", str(message.error.reason)).split()
        raise RejectedReplyError(node, f"error {message.error.code}: {' '.join(words)[:500]}")
    reply = message.content.config_records.get(REPLY, ConfigRecord())
    if reply.get("schema") != SCHEMA:
        raise RejectedReplyError(node, f"wire schema {reply.get('schema')!r}, expected {SCHEMA}")
    require_no_refusal(node, message.content)
    return reply


def require_no_refusal(node: int, content: RecordDict) -> None:
    """Refuse a refusal.

    Raises:
        RejectedReplyError: With its reason.
    """
    reply = content.config_records.get(REPLY, ConfigRecord())
    if "refused" in reply:
        held = reply.get("folds-held")
        reason = explain(reply["refused"], reply.get("error-id"))
        raise RejectedReplyError(node, reason, held if isinstance(held, int) and held >= 0 else None)


def read_reply(
    message: Message,
    sent: AdapterState,
    parts: frozenset[str],
    round: int,
    max_rank: int,
    coding: Coding | None = None,
) -> tuple[AdapterState, dict[str, float]]:
    """Check a train reply and complete it with what the client was sent.

    Args:
        message: The reply.
        sent: The state that the client was sent, at the federation's rank.
        parts: The parts that the reply must hold.
        round: The round it must belong to.
        max_rank: The federation's rank; a client may train a smaller one.
        coding: How updates may be coded.

    Returns:
        The client's full state, and its metrics as floats.

    Raises:
        RejectedReplyError: For an error reply, another schema, a stale round, missing or unknown entries, a wrong shape
            or dtype, a value that is not finite, or a weight that is not positive and finite.
    """
    node = message.metadata.src_node_id
    reply, content = _reply_record(message), message.content
    if reply.get("round") != round:
        raise RejectedReplyError(node, f"reply of round {reply.get('round')!r} in round {round}")
    metrics = _metrics(node, content.metric_records.get(METRICS, MetricRecord()))
    if STATE not in content.array_records:
        raise RejectedReplyError(node, "no adapter state in the reply")
    flat, reference = _arrays(node, content.array_records[STATE]), flatten(sent)
    try:
        flat = apply(coding.decode(flat, reference) if coding else flat, reference)
    except ValueError as error:
        raise RejectedReplyError(node, str(error)) from error
    return _complete(node, flat, reference, parts, max_rank), metrics


def require_positive_sigma(node: int, state: AdapterState) -> None:
    """Refuse what no client under ``exp_norm`` can have trained, and no merge could take.

    Raises:
        RejectedReplyError: If a Sigma is not positive everywhere.
    """
    for name, factors in state.layers.items():
        if not bool((factors.sigma > 0).all()):
            raise RejectedReplyError(node, f"layer {name}: Sigma is not positive, as exp_norm always makes it")


def read_evaluation(message: Message) -> dict[str, float]:
    """The metrics of an evaluation reply.

    Raises:
        RejectedReplyError: For an error reply, a refusal, or metrics that are not an evaluation's.
    """
    node = message.metadata.src_node_id
    if message.has_error() or METRICS not in message.content.metric_records:
        _reply_record(message)  # says why
        raise RejectedReplyError(node, "no evaluation metrics")
    metrics = _finite(node, message.content.metric_records[METRICS])
    missing = {"eval-loss", "eval-accuracy", "eval-examples"} - metrics.keys()
    if missing:
        raise RejectedReplyError(node, f"evaluation metrics without {', '.join(sorted(missing))}")
    return metrics


def read_statistics(message: Message, round: int) -> dict[str, Tensor]:
    """The tensors of a reply with sums for the head; what they must be is `bora_fl.heads`' to check.

    Raises:
        RejectedReplyError: For an error reply, a refusal, a stale round, or arrays that cannot be read.
    """
    node = message.metadata.src_node_id
    reply = _reply_record(message)
    if reply.get("round") != round:
        raise RejectedReplyError(node, f"reply of round {reply.get('round')!r} in round {round}")
    if HEADS not in message.content.array_records:
        raise RejectedReplyError(node, "no sums for the head in the reply")
    return _arrays(node, message.content.array_records[HEADS])


def read_grams(message: Message, sent: AdapterState, kind: Kind) -> dict[str, Tensor]:
    """The Gram matrices of a train reply, one for every layer.

    Raises:
        RejectedReplyError: If a layer has none, or one is no Gram matrix of its inputs.
    """
    node = message.metadata.src_node_id
    if GRAMS not in message.content.array_records:
        raise RejectedReplyError(node, "no Gram matrices in the reply")
    found = _arrays(node, message.content.array_records[GRAMS])
    if found.keys() != sent.layers.keys():
        odd = sorted(found.keys() ^ sent.layers.keys())
        raise RejectedReplyError(node, f"Gram matrices: {odd[0]!r} is on one side only")
    try:
        return {name: unpacked(found[name], f.num_blocks, f.shape[1], kind) for name, f in sent.layers.items()}
    except ValueError as error:
        raise RejectedReplyError(node, str(error)) from error


def read_head_losses(message: Message, count: int) -> tuple[list[float], float]:
    """The losses of the heads that were sent, and the number of held-out examples they are means over.

    Raises:
        RejectedReplyError: For an error reply, a refusal, or metrics that are not `count` losses of at least 0.
    """
    node = message.metadata.src_node_id
    if message.has_error() or METRICS not in message.content.metric_records:
        _reply_record(message)  # says why
        raise RejectedReplyError(node, "no losses of heads")
    metrics = message.content.metric_records[METRICS]
    losses, examples = metrics.get("head-losses"), metrics.get("eval-examples")
    if isinstance(losses, list) and len(losses) == count and isinstance(examples, int):
        found = [float(loss) for loss in losses]
        if all(0 <= loss <= MOST_NUMBER for loss in found) and 0 <= examples <= MOST_EXAMPLES:
            return found, float(examples)
    raise RejectedReplyError(node, f"expected {count} losses and a number of examples, each of at least 0")


def read_roll_call(message: Message) -> tuple[int, int, str]:
    """The partition that a node says it serves, out of how many, and its site's name, empty if it says none.

    Raises:
        RejectedReplyError: For an error reply, another schema, or no valid partition.
    """
    node = message.metadata.src_node_id
    reply = _reply_record(message)
    partition, count = reply.get("partition"), reply.get("num-partitions")
    if not isinstance(partition, int) or not isinstance(count, int) or not 0 <= partition < count:
        raise RejectedReplyError(node, f"partition {partition!r} of {count!r} is not a partition")
    name = reply.get("name", "")
    return partition, count, name if isinstance(name, str) and re.fullmatch(SITE_NAME, name) else ""


def _arrays(node: int, record: ArrayRecord) -> dict[str, Tensor]:
    try:
        return from_arrays(record)
    except Exception as error:  # whatever a broken payload makes the decoder raise, the run goes on
        raise RejectedReplyError(node, f"unreadable arrays ({type(error).__name__}: {error})") from error


def _finite(node: int, record: MetricRecord) -> dict[str, float]:
    if len(record) > MOST_METRICS:
        raise RejectedReplyError(node, f"{len(record)} metrics; {MOST_METRICS} are the most a reply may hold")
    metrics = {}
    for name, value in record.items():
        try:
            number = math.nan if isinstance(value, list) else float(value)
        except OverflowError:
            number = math.inf
        if not abs(number) <= MOST_NUMBER:
            raise RejectedReplyError(node, f"metric {name} = {value!r} is not a finite number")
        metrics[name] = number
    loss, accuracy, examples = (metrics.get(f"eval-{name}", 0.0) for name in ("loss", "accuracy", "examples"))
    if not (loss >= 0 and 0 <= accuracy <= 1 and 0 <= examples <= MOST_EXAMPLES):
        text = f"eval-loss = {loss}, eval-accuracy = {accuracy}, eval-examples = {examples}: out of range"
        raise RejectedReplyError(node, text)
    return metrics


def _metrics(node: int, record: MetricRecord) -> dict[str, float]:
    metrics = _finite(node, record)
    weight = metrics.get("num-examples", 0.0)
    if not 0 < weight <= MOST_EXAMPLES:
        raise RejectedReplyError(
            node, f"num-examples = {weight!r}; a weight must be positive and at most {MOST_EXAMPLES:.0e}"
        )
    return metrics


def _complete(
    node: int, flat: Mapping[str, Tensor], sent: Mapping[str, Tensor], parts: frozenset[str], max_rank: int
) -> AdapterState:
    for name, tensor in flat.items():
        if name not in sent:
            raise RejectedReplyError(node, f"unknown entry {name!r}")
        if tensor.dtype != sent[name].dtype:
            raise RejectedReplyError(node, f"{name} is {tensor.dtype}, expected {sent[name].dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise RejectedReplyError(node, f"{name} holds values that are not finite")
    missing = sorted(
        name for name in sent if name not in flat and (part_of(name) in parts or part_of(name) == "scaling")
    )
    if missing:
        raise RejectedReplyError(node, f"{len(missing)} entries are missing, among them {missing[0]!r}")
    other_rank = {name for name in flat if part_of(name) in PARTS and flat[name].shape != sent[name].shape}
    full = {name: flat.get(name, tensor) for name, tensor in sent.items()}
    for name, tensor in full.items():
        wanted = sent[name].shape
        if part_of(name) in PARTS and other_rank:
            wanted = _at_rank(wanted, part_of(name), _rank_of(name, full))
        if tensor.shape != wanted:
            raise RejectedReplyError(node, f"{name} has shape {tuple(tensor.shape)}, expected {tuple(wanted)}")
    state = unflatten(full)
    for layer, factors in state.layers.items():
        if not 1 <= factors.rank <= max_rank or factors.scaling <= 0:
            raise RejectedReplyError(
                node, f"layer {layer}: rank {factors.rank}, scaling {factors.scaling} are out of range"
            )
    return state


def _rank_of(name: str, flat: Mapping[str, Tensor]) -> int:
    tensor = flat[f"{name.rpartition('/')[0]}/A"]
    return tensor.shape[0] if tensor.dim() else 0


def _at_rank(shape: torch.Size, part: str, rank: int) -> torch.Size:
    return torch.Size([rank, *shape[1:]]) if part == "A" else torch.Size([*shape[:-1], rank])
