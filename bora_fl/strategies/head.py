"""The server's part of the closed-form head: replies to sums, sums to heads, and which head is kept."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from torch import Tensor

from bora_fl.config import Settings
from bora_fl.heads import (
    ClassSums,
    Head,
    check_release,
    choose,
    interpolate,
    lda,
    most_weight,
    narrowed,
    release_noise,
    ridge,
    scaled,
    solve_private,
    solve_private_number,
    widen,
)
from bora_fl.privacy.accounting import EpsilonSummary, summarize
from bora_fl.state import AdapterState, ClientUpdate
from bora_fl.strategies.holding import Held
from bora_fl.strategies.medians import MEDIANS, of_another_scale, tempered
from bora_fl.strategies.screening import heavy
from bora_fl.strategies.secure_aggregation import SecureMean
from bora_fl.strategies.server_state import ServerState
from bora_fl.wire.records import reply_digests, size, to_arrays
from bora_fl.wire.replies import RejectedReplyError, read_head_losses, read_statistics
from bora_fl.wire.schema import HEAD, HEADS

log = logging.getLogger(__name__)

STATISTICS, LOSSES = "query.head_statistics", "query.head_losses"
"""Message types."""


@dataclass(frozen=True)
class HeadLayout:
    """Where the head stands in the adapter's state.

    Attributes:
        weight: Name of the tensor ``[C, d]``.
        bias: Name of the tensor ``[C]``; None for a layer without bias.
        clip_norm: C of the features' norms under record-level privacy, made from public text; 0 without.
    """

    weight: str
    bias: str | None
    clip_norm: float = 0.0

    def of(self, state: AdapterState) -> Head:
        """The head that a state holds."""
        bias = None if self.bias is None else state.tensors[self.bias].double()
        return Head(state.tensors[self.weight].double(), bias)

    def put(self, state: ServerState, head: Head) -> ServerState:
        """A server state with this head in its adapter."""
        tensors = dict(state.current.tensors)
        tensors[self.weight] = head.weight.to(tensors[self.weight].dtype)
        if self.bias is not None and head.bias is not None:
            tensors[self.bias] = head.bias.to(tensors[self.bias].dtype)
        return replace(state, current=AdapterState(state.current.layers, tensors))

    def request(self, state: AdapterState) -> ConfigRecord:
        """What a client needs to know of the sums."""
        return ConfigRecord({"num-classes": len(state.tensors[self.weight]), "clip-norm": self.clip_norm})


@dataclass(frozen=True)
class Solved:
    """What solving the head yields.

    Attributes:
        state: With the head that is kept.
        name: Which of the candidates it is; empty if none could be solved.
        clients: How many clients' sums it is solved from.
        rejected: Node to the reason why its reply does not count.
        bytes_up: Size of the replies.
        bytes_down: Size of the messages.
        digests: Node and kind of message to the digest of the reply, as it came.
        epsilon: What the sites' ledgers hold them to, under record-level privacy.
    """

    state: ServerState
    name: str = ""
    clients: int = 0
    rejected: dict[str, str] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    digests: dict[str, str] = field(default_factory=dict)
    epsilon: EpsilonSummary | None = None


@dataclass
class _Received:
    """What is noted of every reply: bytes in all, and the digests by the names that the sites' logs have for them."""

    bytes: int = 0
    digests: dict[str, str] = field(default_factory=dict)

    def noted(self, replies: Iterable[Message], kind: str) -> Iterator[Message]:
        for reply in replies:
            self.bytes += _bytes([reply])
            self.digests |= reply_digests([reply], kind.rpartition(".")[2].replace("_", "-"))
            yield reply

    @property
    def sorted(self) -> dict[str, str]:
        """The digests, in an order that does not depend on who answered first."""
        return dict(sorted(self.digests.items()))


Ask = Callable[[str, Mapping[str, ConfigRecord | ArrayRecord]], list[Message]]
"""Makes a message of a type to every node, with the adapter and more records."""


def solve(
    layout: HeadLayout,
    state: ServerState,
    settings: Settings,
    round: int,
    ask: Ask,
    exchange: Callable[[list[Message]], Iterable[Message]],
    order: Callable[[int], int] = int,
    secure: Callable[[list[Message], tuple[int, ...]], SecureMean] | None = None,
) -> Solved:
    """Solve the head from the clients' sums, and keep the best of the candidates by their held-out loss.

    A site may refuse, and the head is then solved from the others' sums; with no sums at all it stays as it is.

    Args:
        layout: Where the head is.
        state: What the clients are sent.
        settings: The run's.
        round: 0 before training, else the round whose merge has ended.
        ask: Makes the messages.
        exchange: Sends them, and gives the replies as they come.
        order: A node's place among the clients.
        secure: Sends them under secure aggregation, in the place of `exchange`, for a masked array of that shape; what
            a client answers is not seen.
    """
    noise = release_noise(settings) if settings.privacy.mode == "record" else 0.0
    exact, most = settings.privacy.mode == "none", settings.privacy.max_examples
    classes, dim = state.current.tensors[layout.weight].shape
    kind = settings.model.kind
    several = kind.several  # then the last row: all examples
    shape = (classes + several, narrowed(dim, settings.head.max_width) + kind.number)
    ratio = settings.strategy.max_weight_ratio
    up = _Received()
    sent = ask("train" if secure else STATISTICS, {HEAD: layout.request(state.current)})
    if secure:
        found = secure(sent, ClassSums.vector_shape(*shape))
        sums, clients, rejected = _unmasked(found, shape, most, exact, several), len(found.nodes), found.rejected()
        up.bytes += found.bytes_up
    else:
        replies = up.noted(exchange(sent), STATISTICS)
        sums, clients, rejected = total(
            replies, shape, round, order, max_ratio=ratio, noise_multiplier=noise, several=several, number=kind.number
        )
    down = _bytes(sent)
    if sums is None:
        log.warning("round %d: no client's sums, so the head stays as it is (%s)", round, rejected)
        return Solved(state, rejected=rejected, bytes_up=up.bytes, bytes_down=down, digests=up.sorted)
    spent = summarize(dict.fromkeys(range(clients), settings.privacy.epsilon)) if noise else None
    try:
        heads = candidates(layout, state.current, sums, clients, settings, trained=round > 0)
        heads = {name: head for name, head in heads.items() if head.is_finite()}
    except (ValueError, RuntimeError) as error:  # sums of no examples, or beyond what numbers hold
        log.warning("round %d: %s", round, error)
        heads = {}
    if not heads:
        rejected["head"] = "no finite head can be solved from the sums, so it stays as it is"
        return Solved(state, "", 0, rejected, up.bytes, down, up.sorted, spent)
    name = next(iter(heads))
    if len(heads) > 1:
        sent = ask("train" if secure else LOSSES, {HEADS: to_arrays(_flat(heads))})
        down += _bytes(sent)
        if secure:
            found = secure(sent, (len(heads) + 1,))
            mean = [math.inf] * len(heads) if found.mean is None else found.mean[0].tolist()
            by_name = dict(zip(heads, mean, strict=False))
            name, _ = choose(heads, lambda name, _: by_name[name])
            rejected |= found.rejected()
            up.bytes += found.bytes_up
        else:
            measured = sorted(up.noted(exchange(sent), LOSSES), key=lambda reply: order(reply.metadata.src_node_id))
            name, unmeasured = best(heads, measured, ratio)
            rejected |= unmeasured
    if exact and not several and not kind.number:
        state = replace(state, class_shares=tuple((sums.counts / sums.counts.sum()).tolist()))
    log.info("round %d: the head is %s, solved from the sums of %d clients", round, name, clients)
    return Solved(layout.put(state, heads[name]), name, clients, rejected, up.bytes, down, up.sorted, spent)


def total(
    replies: Iterable[Message],
    shape: Sequence[int],
    round: int,
    order: Callable[[int], int] = int,
    *,
    max_ratio: float = 0.0,
    noise_multiplier: float = 0.0,
    several: bool = False,
    number: bool = False,
) -> tuple[ClassSums | None, int, dict[str, str]]:
    """Add up the clients' sums: each reply is checked as it comes, and waits in a file until all have come.

    They are added in the order of the clients, so that nothing of the result depends on the order in which they come.

    Args:
        replies: Replies to `STATISTICS`, in any order.
        shape: ``[C, k]``, or with `several` ``[C + 1, k]``, k being how wide the summed features are.
        round: The round they must belong to.
        order: A node's place among the clients.
        max_ratio: Sums over more than this many times the median client's examples are rejected; 0 is off. So are sums
            of features that are much larger than the median client's. Noised ones are scaled down instead, see
            `bora_fl.heads.most_weight`.
        noise_multiplier: Of each client's release; 0 for sums without noise. Sums that no examples can have are
            rejected in either case.
        several: Whether an example may have several classes, or none.
        number: Whether the last feature is the number to be predicted, which may differ more between clients.

    Returns:
        The total, of how many clients, and node to the reason why its reply is rejected.
    """
    held, waiting = Held(0, AdapterState()), dict[int, ClientUpdate]()
    examples, squares, numbers = dict[int, float](), dict[int, float](), dict[int, float]()
    rejected = dict[str, str]()
    for message in replies:
        node = message.metadata.src_node_id
        try:
            packed = read_statistics(message, round)
            sums = ClassSums.from_tensors(packed, shape[0], shape[1], several=several)
            if noise_multiplier:
                check_release(sums, noise_multiplier, number=number)
            else:
                sums.check(number=number)
        except RejectedReplyError as reply:
            rejected[str(node)] = reply.reason
        except ValueError as error:
            rejected[str(node)] = str(error)
        else:
            # As they came, unpacked sums being eight times as large; and not in memory, which they would break up.
            examples[node] = sums.examples
            second = sums.gram.diagonal() / max(examples[node], 1.0)
            squares[node] = float(second[: shape[1] - number].sum())
            numbers |= {node: float(second[-1])} if number else {}
            waiting[node] = held.hold(ClientUpdate(node, 1.0, AdapterState({}, packed)))
    most = math.inf
    if noise_multiplier:
        most = most_weight(examples.values(), shape[0], noise_multiplier, number=number)
    left_out = {} if noise_multiplier else heavy(examples, max_ratio)
    for of, times, found in (("features", MEDIANS, squares), ("numbers", MEDIANS**2, numbers)):
        kept = {node: square for node, square in found.items() if node not in left_out and examples[node]}
        left_out |= {} if noise_multiplier else of_another_scale(kept, of, times)
    rejected |= {str(node): reason for node, reason in left_out.items()}
    added, clients = None, 0
    for node in sorted(waiting.keys() - left_out.keys(), key=lambda node: (order(node), node)):
        sums = ClassSums.from_tensors(waiting[node].state.tensors, shape[0], shape[1], several=several)
        sums = sums.times(most / examples[node]) if examples[node] > most else sums
        added, clients = sums if added is None else added + sums, clients + 1
    return added, clients, dict(sorted(rejected.items()))


def _unmasked(
    found: SecureMean, shape: Sequence[int], max_examples: int, exact: bool, several: bool = False
) -> ClassSums | None:
    """The clients' sums, from the mean of their vectors in units of `max_examples`; exact counts are whole numbers."""
    if found.mean is None or not found.nodes:
        return None
    vector = torch.from_numpy(found.mean[0]) * (len(found.nodes) * max_examples)
    sums = ClassSums.from_vector(vector, shape[0], shape[1], several=several)
    if not exact:
        return sums
    # Masking rounds at random: what is left of a class that nobody has would count as one with tiny shares.
    counts = sums.counts.round().clamp(min=0)
    return replace(sums, counts=counts, sums=torch.where(counts[:, None] > 0, sums.sums, 0.0))


def candidates(
    layout: HeadLayout, state: AdapterState, sums: ClassSums, clients: int, settings: Settings, *, trained: bool
) -> dict[str, Head]:
    """The heads to choose from, by name, in order of preference.

    Under record-level privacy there is one, since nothing may be measured to choose by; otherwise the solved head at
    several scales of its logits and, once the head was trained, the trained one and its mean with each of these.

    Args:
        layout: Where the head is.
        state: Holds the head that clients trained.
        sums: Over all clients.
        clients: How many.
        settings: The run's.
        trained: Whether the state's head was trained.
    """
    bias, dim = layout.bias is not None, state.tensors[layout.weight].shape[1]
    if settings.privacy.mode == "record":
        noised = (sums, release_noise(settings), clients, layout.clip_norm)
        if settings.number_range:
            private = solve_private_number(*noised, settings.number_range, bias=bias)
        else:
            private = solve_private(*noised, bias=bias)
        return {"solved": widen(private, dim)}
    if settings.model.kind.number:
        solved = {"solved": widen(ridge(sums, bias=bias), dim)}
    else:
        solved = scaled(widen(lda(sums, bias=bias), dim))
    if not trained:
        return solved
    own = layout.of(state)
    return {"trained": own, **solved, **{f"mean {name}": interpolate(own, head, 0.5) for name, head in solved.items()}}


def best(heads: Mapping[str, Head], replies: Iterable[Message], max_ratio: float = 0.0) -> tuple[str, dict[str, str]]:
    """The name of the head with the least loss over all clients' held-out examples; of equal ones the first.

    What a client says of how its losses differ counts for no more than `MEDIANS` median clients.

    Args:
        heads: What was sent, in order.
        replies: Replies to `LOSSES`.
        max_ratio: As in `total`, of held-out examples.

    Returns:
        The name, and node to the reason why its reply is rejected.
    """
    found, rejected = dict[int, tuple[list[float], float]](), dict[str, str]()
    for message in replies:
        try:
            found[message.metadata.src_node_id] = read_head_losses(message, len(heads))
        except RejectedReplyError as reply:
            rejected[str(reply.node_id)] = reply.reason
    for node, reason in heavy({node: examples for node, (_, examples) in found.items()}, max_ratio).items():
        rejected[str(node)] = reason
        del found[node]
    above = {node: [loss - min(losses) for loss in losses] for node, (losses, examples) in found.items() if examples}
    kept = tempered(above)
    by_name = {name: sum(found[node][1] * more[k] for node, more in kept.items()) for k, name in enumerate(heads)}
    return choose(heads, lambda name, _: by_name[name])[0], rejected


def _flat(heads: Mapping[str, Head]) -> dict[str, Tensor]:
    """The heads as named tensors ``<position>/weight`` and ``<position>/bias``."""
    flat = {f"{k}/weight": head.weight.float() for k, head in enumerate(heads.values())}
    return flat | {f"{k}/bias": head.bias.float() for k, head in enumerate(heads.values()) if head.bias is not None}


def _bytes(messages: Iterable[Message]) -> int:
    return sum(size(message.content) for message in messages if message.has_content())
