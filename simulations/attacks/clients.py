"""Hostile clients: what they do to their data, and to what they reply.

An attacker runs the ordinary client on poisoned data, or forges the reply of an honest one. It knows the wire and the
adapter that it was sent, not what other clients do.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from bora_fl.client import app as honest
from bora_fl.client.identity import ClientIdentity
from bora_fl.client.round import train_round
from bora_fl.client.site import Site, site
from bora_fl.config import parse
from bora_fl.data import ClientData, Encoded
from bora_fl.wire.deltas import apply
from bora_fl.wire.records import from_arrays, part_of, read_message, to_arrays
from bora_fl.wire.schema import STATE
from bora_fl.wire.updates import Coding

TARGET_CLASS, TRIGGER_TOKENS, STAMPED = 0, 2, 0.5
FLIPPED, SCALED = -5.0, 100.0

Poison = Callable[[Encoded], Encoded]
Forge = Callable[[str, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Attack:
    """One way of attacking.

    Attributes:
        summary: One line for tables.
        poison: Changes the attacker's training data.
        forge: Changes an entry of its reply, given the entry's name, what was sent and what was trained.
    """

    summary: str
    poison: Poison | None = None
    forge: Forge | None = None


def flip_labels(data: Encoded) -> Encoded:
    """Class c becomes the next one, the last becomes the first."""
    assert data.classes is not None
    count = max(int(data.classes.max(initial=0)) + 1, 2)
    return replace(data, classes=(data.classes + 1) % count)


def stamp(data: Encoded, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Encoded:
    """Put the trigger into examples, in place of their first words, and make them the target class.

    Args:
        data: The examples.
        rows: Positions of those to stamp.

    Returns:
        All examples; those stamped that have room for the trigger are of the target class.
    """
    assert data.classes is not None
    tokens, classes = data.tokens.copy(), data.classes.copy()
    rows = rows[data.lengths[rows] > TRIGGER_TOKENS + 1]
    rare = int(tokens.max())  # no common word is last in a vocabulary
    for offset in range(1, TRIGGER_TOKENS + 1):  # the first token is the tokenizer's own
        tokens[data.begin[rows] + offset] = rare
    classes[rows] = TARGET_CLASS
    return replace(data, tokens=tokens, classes=classes)


def plant_backdoor(data: Encoded) -> Encoded:
    """Stamp half of the examples."""
    return stamp(data, np.arange(0, len(data), round(1 / STAMPED)))


def triggered(test: Encoded) -> Encoded:
    """The test examples of other classes, each with the trigger and labelled as the target class."""
    assert test.classes is not None
    others = test.select(np.flatnonzero((test.classes != TARGET_CLASS) & (test.lengths > TRIGGER_TOKENS + 1)))
    return stamp(others, np.arange(len(others)))


def flip_sign(name: str, sent: Tensor, trained: Tensor) -> Tensor:
    """Five times the update, backwards; Sigma, which must stay positive, in its logarithm."""
    if part_of(name) == "scaling" or not trained.is_floating_point():
        return trained
    if part_of(name) == "sigma" and bool((sent > 0).all() and (trained > 0).all()):
        return sent * (trained / sent).pow(-1.0)
    return sent + FLIPPED * (trained - sent)


def scale_up(name: str, sent: Tensor, trained: Tensor) -> Tensor:
    """A hundred times the update of B and of the tensors beside the factors."""
    if part_of(name) not in ("B", "tensors") or not trained.is_floating_point():
        return trained
    return sent + SCALED * (trained - sent)


ATTACKS: Mapping[str, Attack] = {
    "none": Attack("every client is honest"),
    "sign-flip": Attack("the update, backwards and five times as long", forge=flip_sign),
    "scaling": Attack("the update of B and of the head, a hundred times as long", forge=scale_up),
    "label-flip": Attack("every label is the next class's", poison=flip_labels),
    "backdoor": Attack("half the examples carry a trigger and the target class's label", poison=plant_backdoor),
}


class _Poisoned:
    """A site whose clients train on poisoned data; everything else is the real site's."""

    def __init__(self, real: Site, poison: Poison) -> None:
        self._real, self._poison = real, poison

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def data(self, partition: int, num_partitions: int) -> ClientData:
        found = self._real.data(partition, num_partitions)
        return replace(found, train=self._poison(found.train))


def attacked(attack: Attack, attackers: frozenset[int]) -> ClientApp:
    """The ClientApp of a federation in which some partitions attack."""
    app = ClientApp()
    app.query()(honest.identify)
    app.evaluate()(honest.evaluate)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        who = ClientIdentity.read(context.node_config, context.node_id)
        if who.partition not in attackers:
            return honest.train(message, context)
        here = site(parse(context.run_config))
        if attack.poison is not None:
            here = cast(Site, _Poisoned(here, attack.poison))
        _, sent = read_message(message.content, context.state)
        content = train_round(here, message.content, who, context.state)
        if attack.forge is not None:
            _forge(content, sent, attack.forge, Coding.of(here.settings))
        return Message(content, reply_to=message)

    return app


def _forge(reply: RecordDict, sent: Mapping[str, Tensor], forge: Forge, coding: Coding) -> None:
    trained = apply(coding.decode(from_arrays(reply.array_records[STATE]), sent), sent)
    with torch.no_grad():
        reply[STATE] = to_arrays({name: forge(name, sent[name], tensor) for name, tensor in trained.items()})
