"""A client's part of a round, free of Flower's transport: what was received in, what is replied out."""

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from flwr.app import RecordDict
from torch import Tensor

from bora_fl.blocks import at_rank
from bora_fl.blocks.gram import Kind
from bora_fl.client.grams import input_grams
from bora_fl.client.identity import ClientIdentity
from bora_fl.client.leaving import LOCAL, leave, own, recall
from bora_fl.client.losses import prior_shift
from bora_fl.client.moments import kept
from bora_fl.client.optimizers import make_optimizer, round_factors
from bora_fl.client.private import train_privately_for_a_round
from bora_fl.client.processes import Processes
from bora_fl.client.share import Share
from bora_fl.client.site import Site
from bora_fl.client.training import TrainResult, train
from bora_fl.config import Settings
from bora_fl.data import ClientData, Encoded
from bora_fl.device import autocast, settle
from bora_fl.evaluate import Metrics, evaluate
from bora_fl.models import FederatedModel
from bora_fl.privacy import overlap
from bora_fl.privacy.ledger import ledger_folder
from bora_fl.privacy.local import LocalPrivacy
from bora_fl.privacy.policy import EVALUATION, PROTECTED, SitePolicy, released
from bora_fl.seeds import derive
from bora_fl.state import AdapterState, unflatten
from bora_fl.wire.records import Instruction, folds_of, holds_every_factor, read_message
from bora_fl.wire.refusals import Code, Refused, refuse_as
from bora_fl.wire.release import (
    ClientRelease,
    EvaluationRelease,
    GramRelease,
    LocalRelease,
    PlainRelease,
    RecordRelease,
    Release,
)

log = logging.getLogger(__name__)

OnStep = Callable[[str, int, int], None]
"""Told what is being done, how many steps of it, out of how many; what it raises ends the round."""


def train_round(
    site: Site,
    content: RecordDict,
    who: ClientIdentity,
    memory: RecordDict,
    on_step: OnStep | None = None,
    policy: SitePolicy | None = None,
    processes: Processes | None = None,
    share: Share | None = None,
) -> RecordDict:
    """Receive, train, reply.

    Args:
        site: This process's models and data, by the settings that the site grants.
        content: The server's message.
        who: The client.
        memory: What the client keeps between rounds (factors that never leave it).
        on_step: Called between steps.
        policy: The site's.
        processes: Others that train along once they are told; this one alone reads and writes what stays.
        share: This process's, where the others do the whole job along.

    Returns:
        The reply's content.

    Raises:
        Refused: If frozen weights cannot be brought to the round's version, the message cannot be understood, or the
            round does not fit the site's policy or budget.
    """
    instruction, sent = understand(content, memory)
    if instruction.gram and _withheld(site, policy):
        raise Refused(Code.STATISTICS_WITHHELD, "Gram matrices of the layers' inputs are asked for")
    model, received = _receive(site, content, instruction, sent, who, memory)
    data = _data(site, who)
    mode = site.settings.privacy.mode
    if policy and mode in PROTECTED:
        _warn_of_overlap(site, policy)
    by_mode: dict[str, Callable[[_Round], Release]] = {"record": _train_by_record, "local": _train_locally}
    train_by = by_mode.get(mode, _train_openly)
    told = (site, model, data, instruction, who, received, memory, on_step, policy)
    whole = holds_every_factor(received, sent)
    release = train_by(_Round(*told, content=content, processes=processes, share=share, replies_whole=whole))
    reply = leave(release, sent, received, instruction, site.settings, who, memory)
    if instruction.gram:
        reply.update(_input_grams(site, model, data, instruction, who, instruction.gram).content())
    return reply


def _withheld(site: Site, policy: SitePolicy | None) -> bool:
    """Whether sums over the records stay at the site: no noise protects them, or the policy does not release them."""
    return site.settings.privacy.mode != "none" or (policy is not None and not policy.head_statistics)


def _input_grams(
    site: Site, model: FederatedModel, data: ClientData, instruction: Instruction, who: ClientIdentity, kind: Kind
) -> GramRelease:
    settings, device = site.settings, settle(model.model)
    grams = input_grams(
        model,
        data.train,
        kind,
        settings.strategy.gram_examples,
        settings.train.evaluation_batch_size,
        derive(settings.run.seed, "grams", instruction.round, who.partition),
        lambda: autocast(device, settings.train.precision),
    )
    return GramRelease(grams)


@dataclass(frozen=True)
class _Round:
    """What a round's training works on."""

    site: Site
    model: FederatedModel
    data: ClientData
    instruction: Instruction
    who: ClientIdentity
    received: AdapterState
    memory: RecordDict
    on_step: OnStep | None
    policy: SitePolicy | None = None
    content: RecordDict | None = None
    processes: Processes | None = None
    share: Share | None = None
    replies_whole: bool = False

    @property
    def factors(self) -> list[float]:
        """The round's shares of the learning rate."""
        return round_factors(self.site.settings, self.instruction.round, len(self.data.train))

    def train(self) -> TrainResult:
        """Train without noise, together with the other processes if there are any."""
        if self.processes is None or self.content is None or self.share is not None:
            return self.train_share(self.share)
        with self.processes.at_work(self.site.settings, self.content, self.who, self.memory) as share:
            return self.train_share(share)

    def train_share(self, share: Share | None) -> TrainResult:
        """Train this process's share of every batch, or all of it."""
        self.model.train_only(self.instruction.trains)
        settings = self.site.settings
        seed = derive(settings.run.seed, "batches", self.instruction.round, self.who.partition)
        step, data, options = stage("train", self.on_step), self.data.train, settings.train
        optimizer = make_optimizer(self.model, options, self.factors)
        goes_on = options.optimizer_state == "kept"
        with kept(self.memory, self.received, self.model, optimizer) if goes_on else nullcontext():
            return train(
                *(self.model, data, options),
                optimizer=optimizer,
                seed=seed,
                shift=self._shift(),
                hold=options.distillation if self.instruction.class_shares else 0.0,  # the head was solved
                on_step=step,
                share=share,
            )

    def _shift(self) -> Tensor | None:
        train, classes = self.site.settings.train, self.data.train.classes
        if not train.label_prior or classes is None:
            return None
        shares = self.instruction.class_shares
        with refuse_as(Code.MESSAGE_INVALID):
            return prior_shift(classes, self.model.num_classes, shares, train.label_prior, train.label_prior_floor)


def _train_openly(round: _Round) -> PlainRelease | ClientRelease:
    """Under ``none`` and ``client``: exact, less the numbers that the site withholds."""
    mode = round.site.settings.privacy.mode
    allowed = released(round.policy, mode)
    measured: dict[str, float | int] = {}
    if round.instruction.evaluate and len(round.data.evaluation) and evaluates(round.site.settings, round.policy):
        found = _evaluate(round.site, round.model, round.data.evaluation, round.on_step)
        measured |= {"eval_loss": found.loss, "eval_accuracy": found.accuracy, "eval_examples": found.examples}
    started = time.perf_counter()
    result = round.train()
    measured |= {"train_loss": result.loss, "steps": result.steps, "num_examples": round.data.train.examples}
    measured |= {"train_seconds": time.perf_counter() - started}
    leaves: dict[str, Any] = {name: v for name, v in measured.items() if name.replace("_", "-") in allowed}
    kind = PlainRelease if mode == "none" else ClientRelease
    return kind(state=round.model.read(), partition=round.who.partition, rank=round.model.rank, **leaves)


def evaluates(settings: Settings, policy: SitePolicy | None) -> bool:
    """Whether a client evaluates what it received before it trains, if it is asked to."""
    mode = settings.privacy.mode
    return mode not in ("record", "local") and released(policy, mode) >= EVALUATION


def _train_by_record(round: _Round) -> RecordRelease:
    """Under ``record``: whatever goes wrong once records are read has one code, since the reason depends on them."""
    settings = round.site.settings
    round.model.train_only(round.instruction.trains)
    with refuse_as(Code.TRAINING_FAILED, Code.BUDGET_EXCEEDED):
        spent = train_privately_for_a_round(
            round.model,
            round.data.train,
            settings,
            factors=round.factors,
            run_id=round.instruction.run_id,
            partition=round.who.partition,
            policy=round.policy,
            on_step=stage("train", round.on_step),
        )
    log.info("round %d: %s", round.instruction.round, spent)
    return RecordRelease(
        state=round.model.read(),
        partition=round.who.partition,
        rank=round.model.rank,
        epsilon_per_record=settings.privacy.epsilon,
    )


def _train_locally(round: _Round) -> LocalRelease:
    """Under ``local``: a training that diverges sends a noised zero: a refusal would tell of the data."""
    booked = _book_locally(round)
    with refuse_as(Code.TRAINING_FAILED):
        try:
            round.train()
            trained = round.model.read()
        except FloatingPointError as error:
            log.warning("round %d: %s; the update counts as zero", round.instruction.round, error)
            trained = round.received
    return LocalRelease(
        state=booked.protect(trained, round.received, round.instruction.shares & round.instruction.trains),
        partition=round.who.partition,
        rank=round.model.rank,
        epsilon_per_client=booked.epsilon,
        noise_multiplier=booked.noise_multiplier,
    )


def train_share(site: Site, content: RecordDict, who: ClientIdentity, memory: RecordDict, share: Share) -> None:
    """What a further process does of `train_round`, which the first one has begun: its share of the training."""
    instruction, sent = understand(content, memory)
    model, received = _receive(site, content, instruction, sent, who, memory)
    _Round(site, model, _data(site, who), instruction, who, received, memory, on_step=None).train_share(share)


def train_along(
    site: Site, content: RecordDict, who: ClientIdentity, memory: RecordDict, share: Share, evaluates: bool
) -> None:
    """What a further process does of `train_round` where the base model's weights are shared out: every pass."""
    instruction, sent = understand(content, memory)
    model, received = _receive(site, content, instruction, sent, who, memory)
    data = _data(site, who)
    if evaluates and instruction.evaluate and len(data.evaluation):
        _evaluate(site, model, data.evaluation, on_step=None)
    _Round(site, model, data, instruction, who, received, memory, on_step=None).train_share(share)
    if instruction.gram:
        _input_grams(site, model, data, instruction, who, instruction.gram)


def evaluate_round(
    site: Site, content: RecordDict, who: ClientIdentity, memory: RecordDict, on_step: OnStep | None = None
) -> RecordDict:
    """Evaluate the received adapter on the client's held-out part; the counterpart of `train_round`."""
    _, model, data = receive(site, content, who, memory)
    found = _evaluate(site, model, data.evaluation, on_step)
    return EvaluationRelease(who.partition, found.loss, found.accuracy, found.examples).content()


def receive(
    site: Site, content: RecordDict, who: ClientIdentity, memory: RecordDict
) -> tuple[Instruction, FederatedModel, ClientData]:
    """Bring the model to what a message carries, and read the client's data.

    Raises:
        Refused: If the message cannot be understood or the data cannot be read.
    """
    instruction, sent = understand(content, memory)
    model, _ = _receive(site, content, instruction, sent, who, memory)
    return instruction, model, _data(site, who)


def understand(content: RecordDict, memory: RecordDict) -> tuple[Instruction, AdapterState]:
    """What a message asks, and the state that it carries, completed from what the client keeps."""
    instruction, flat = read_message(content, memory)
    own(memory, instruction.run_id)
    with refuse_as(Code.MESSAGE_INVALID):
        return instruction, unflatten(flat)


def _data(site: Site, who: ClientIdentity) -> ClientData:
    with refuse_as(Code.DATA_UNREADABLE, Code.OUT_OF_MEMORY):
        return site.data(who.partition, who.num_partitions)


def _warn_of_overlap(site: Site, policy: SitePolicy) -> None:
    with refuse_as(Code.LEDGER_UNREADABLE):
        shares = overlap.note(ledger_folder(site.settings), policy.ledger, site.texts())
    for other, share in shares.items():
        log.warning(
            "about %.1f %% of the records of data-set = %r are, or were, in the data set of the ledger %s too: what "
            "they have spent there is not counted here; give both the same name",
            100 * share,
            policy.data_set,
            other,
        )


def _receive(
    site: Site,
    content: RecordDict,
    instruction: Instruction,
    sent: AdapterState,
    who: ClientIdentity,
    memory: RecordDict,
) -> tuple[FederatedModel, AdapterState]:
    """Bring the model to what was sent: folds into the frozen weights, local factors, the client's own rank."""
    settings = site.settings.adapter
    rank = min(who.max_rank or settings.rank, settings.rank)
    model = site.model(rank)
    if folds := folds_of(content):
        with refuse_as(Code.MESSAGE_INVALID):
            site.store_folds(model, instruction.run_id, folds, instruction.fold_version)
    held = site.held_folds(instruction.run_id, instruction.fold_version)
    if held < instruction.fold_version:
        text = f"this site holds the folds up to version {held}, the round needs version {instruction.fold_version}"
        raise Refused(Code.FOLDS_MISSING, text, folds_held=held)
    state = recall(memory, sent, instruction)
    site.fold_to(model, instruction.run_id, instruction.fold_version)
    layers = {name: at_rank(f, rank, settings.transform) for name, f in state.layers.items()}
    state = AdapterState(layers, state.tensors)
    model.write(state)
    return model, state


def _book_locally(round: _Round) -> LocalPrivacy:
    settings, instruction = round.site.settings, round.instruction
    if round.replies_whole and (instruction.trains - instruction.shares or LOCAL in round.memory.array_records):
        # What is kept here, now or since an earlier round, is not noised.
        raise Refused(
            Code.RANK_MISMATCH,
            f"rank {round.model.rank} here, another in the message, with privacy.mode = 'local': this strategy keeps "
            "some parts on the client, and a reply of another rank would hold them; use the federation's, "
            f"{settings.adapter.rank}",
        )
    return LocalPrivacy.book(settings, instruction.run_id, round.who.partition, round.policy)


def _evaluate(site: Site, model: FederatedModel, data: Encoded, on_step: OnStep | None) -> Metrics:
    device = settle(model.model)
    train = site.settings.train
    return evaluate(
        model.model,
        data,
        train.evaluation_batch_size,
        beta=train.dpo_beta,
        autocast=lambda: autocast(device, train.precision),
        progress=stage("evaluate", on_step),
    )


def stage(name: str, on_step: OnStep | None) -> Callable[[int, int], None] | None:
    """`on_step` for one kind of work."""
    return partial(on_step, name) if on_step else None
