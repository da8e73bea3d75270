"""A client's part of a round, free of Flower's transport: what was received in, what is replied out."""

import time
from collections.abc import Callable
from functools import partial

from flwr.app import ArrayRecord, RecordDict

from bora_fl.blocks import at_rank
from bora_fl.client.identity import ClientIdentity
from bora_fl.client.private import train_privately_for_a_round
from bora_fl.client.site import Site
from bora_fl.client.training import learning_rate_factor, train
from bora_fl.config import Settings
from bora_fl.data import Encoded
from bora_fl.device import autocast, settle
from bora_fl.evaluate import Metrics, evaluate
from bora_fl.models import FederatedModel
from bora_fl.privacy.local import LocalPrivacy
from bora_fl.seeds import derive
from bora_fl.state import AdapterState, flatten, unflatten
from bora_fl.wire.records import Instruction, from_arrays, part_of, reply_content, state_of, to_arrays
from bora_fl.wire.schema import FOLDS
from bora_fl.wire.sparsity import sparsify

LOCAL = "local-factors"

OnStep = Callable[[str, int, int], None]
"""Told what is being done, how many steps of it, out of how many; what it raises ends the round."""


class MissingFoldsError(RuntimeError):
    """This site lacks folds of the frozen weights.

    Attributes:
        held: The newest version up to which it holds all.
    """

    def __init__(self, held: int, wanted: int) -> None:
        super().__init__(f"this site holds the folds up to version {held}, the round needs version {wanted}")
        self.held = held


def train_round(
    site: Site, content: RecordDict, who: ClientIdentity, memory: RecordDict, on_step: OnStep | None = None
) -> RecordDict:
    """Receive, train, reply.

    Args:
        site: This process's models and data.
        content: The server's message.
        who: The client.
        memory: What the client keeps between rounds (factors that never leave it).
        on_step: Called between steps.

    Returns:
        The reply's content.

    Raises:
        MissingFoldsError: If frozen weights cannot be brought to the round's version.
        ValueError: If the message cannot be understood.
    """
    instruction = Instruction.read(content)
    sent = state_of(content)
    model, received = _receive(site, content, instruction, sent, who, memory)
    data = site.data(who.partition, who.num_partitions)
    settings = site.settings
    metrics: dict[str, float | int] = {"partition": who.partition, "rank": model.rank}
    mode, sends = settings.privacy.mode, instruction.shares & instruction.trains
    local = _book_locally(settings, instruction, who) if mode == "local" else None
    if instruction.evaluate and len(data.evaluation) and mode not in ("record", "local"):
        metrics |= _named(_evaluate(site, model, data.evaluation, on_step))
    model.train_only(instruction.trains)
    factor = learning_rate_factor(settings.train, instruction.round, settings.run.num_rounds)
    started = time.perf_counter()
    if mode == "record":
        metrics |= train_privately_for_a_round(
            model,
            data.train,
            settings,
            factor=factor,
            run_id=instruction.run_id,
            partition=who.partition,
            on_step=_stage("train", on_step),
        )
    else:
        seed = derive(settings.run.seed, "batches", instruction.round, who.partition)
        on_train_step = _stage("train", on_step)
        result = train(model, data.train, settings.train, factor=factor, seed=seed, on_step=on_train_step)
        metrics |= {"train-loss": result.loss, "steps": result.steps}
    trained = model.read()
    _remember(memory, trained, instruction)
    metrics |= {"num-examples": len(data.train), "train-seconds": time.perf_counter() - started}
    if local:
        trained = local.protect(trained, received, sends)
        metrics = {"partition": who.partition, "rank": model.rank} | local.metrics()
    if instruction.sparsity < 1:
        trained = sparsify(trained, received, instruction.sparsity)
    return reply_content(trained, sent, sends, instruction.round, metrics)


def evaluate_round(
    site: Site, content: RecordDict, who: ClientIdentity, memory: RecordDict, on_step: OnStep | None = None
) -> dict[str, float | int]:
    """Evaluate the received adapter on the client's held-out part; the counterpart of `train_round`."""
    instruction = Instruction.read(content)
    model, _ = _receive(site, content, instruction, state_of(content), who, memory)
    data = site.data(who.partition, who.num_partitions)
    return {"partition": who.partition} | _named(_evaluate(site, model, data.evaluation, on_step))


def _receive(
    site: Site,
    content: RecordDict,
    instruction: Instruction,
    sent: AdapterState,
    who: ClientIdentity,
    memory: RecordDict,
) -> tuple[FederatedModel, AdapterState]:
    """Bring the model to what was sent: folds into the frozen weights, local factors, the client's own rank."""
    if FOLDS in content.array_records:
        site.store_folds(instruction.run_id, from_arrays(content.array_records[FOLDS]))
    held = site.held_folds(instruction.run_id, instruction.fold_version)
    if held < instruction.fold_version:
        raise MissingFoldsError(held, instruction.fold_version)
    state = _recall(memory, sent, instruction)
    settings = site.settings.adapter
    rank = min(who.max_rank or settings.rank, settings.rank)
    model = site.model(rank)
    site.fold_to(model, instruction.run_id, instruction.fold_version)
    layers = {name: at_rank(f, rank, settings.transform) for name, f in state.layers.items()}
    state = AdapterState(layers, state.tensors)
    model.write(state)
    return model, state


def _book_locally(settings: Settings, instruction: Instruction, who: ClientIdentity) -> LocalPrivacy:
    if 0 < who.max_rank < settings.adapter.rank and instruction.trains - instruction.shares:
        # A reply of another rank holds every factor, and those that are kept here are not noised.
        raise ValueError(
            f"rank = {who.max_rank} in the node config with privacy.mode = 'local': this strategy keeps some factors "
            f"on the client, and a reply of another rank would hold them; use the federation's, {settings.adapter.rank}"
        )
    return LocalPrivacy.book(settings, instruction.run_id, who.partition)


def _evaluate(site: Site, model: FederatedModel, data: Encoded, on_step: OnStep | None) -> Metrics:
    device = settle(model.model)
    train = site.settings.train
    return evaluate(
        model.model,
        data,
        train.evaluation_batch_size,
        autocast=lambda: autocast(device, train.precision),
        progress=_stage("evaluate", on_step),
    )


def _stage(name: str, on_step: OnStep | None) -> Callable[[int, int], None] | None:
    return partial(on_step, name) if on_step else None


def _named(metrics: Metrics) -> dict[str, float | int]:
    return {"eval-loss": metrics.loss, "eval-accuracy": metrics.accuracy, "eval-examples": metrics.examples}


def _remember(memory: RecordDict, trained: AdapterState, instruction: Instruction) -> None:
    """Keep what does not leave the client."""
    local = {
        name: t for name, t in flatten(trained).items() if part_of(name) in instruction.trains - instruction.shares
    }
    if local:
        memory[LOCAL] = to_arrays(local)


def _recall(memory: RecordDict, sent: AdapterState, instruction: Instruction) -> AdapterState:
    kept: ArrayRecord | None = memory.array_records.get(LOCAL)
    if kept is None:
        return sent
    flat = flatten(sent)
    local = {n: t for n, t in from_arrays(kept).items() if n in flat and part_of(n) not in instruction.shares}
    return unflatten(flat | local)
