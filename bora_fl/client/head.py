"""A client's part of the closed-form head: sums over its examples, and how the solved heads do on its held-out part."""

import math

import torch
from flwr.app import RecordDict

from bora_fl.client.identity import ClientIdentity
from bora_fl.client.round import OnStep, receive, stage
from bora_fl.client.site import Site
from bora_fl.device import autocast, settle
from bora_fl.heads import Head, collect, head_metrics, release, release_noise
from bora_fl.privacy.ledger import site_ledger
from bora_fl.privacy.policy import SitePolicy, require_small_delta
from bora_fl.wire.records import from_arrays
from bora_fl.wire.refusals import Code, Refused, refuse_as
from bora_fl.wire.release import HeadLossesRelease, StatisticsRelease
from bora_fl.wire.schema import HEAD, HEADS


def statistics(
    site: Site,
    content: RecordDict,
    who: ClientIdentity,
    memory: RecordDict,
    on_step: OnStep | None = None,
    policy: SitePolicy | None = None,
) -> RecordDict:
    """Sum up the features that the head reads; under ``privacy.mode = record`` as one noised release.

    Args:
        site: This process's models and data, by the settings that the site grants.
        content: The server's message.
        who: The client.
        memory: What the client keeps between rounds.
        on_step: Called between batches.
        policy: The site's.

    Returns:
        The reply's content.

    Raises:
        Refused: If the message cannot be understood, the model has no such head, or the release does not fit the
            site's policy or budget; it is charged to the ledger before the first record is read.
    """
    instruction, model, data = receive(site, content, who, memory)
    with refuse_as(Code.MESSAGE_INVALID):
        asked = content.config_records[HEAD]
        num_classes, clip_norm = int(asked["num-classes"]), float(asked["clip-norm"])  # type: ignore[arg-type]
    settings = site.settings
    private = settings.privacy.mode == "record"
    # Fewer classes than labels, or a norm that is none, would fail on some records alone, and so tell of them.
    if num_classes != model.model.config.num_labels or (private and not 0 < clip_norm < math.inf):
        raise Refused(Code.MESSAGE_INVALID, f"the head's sums for {num_classes} classes and a norm of {clip_norm}")
    noise = release_noise(settings) if private else 0.0
    if private:
        require_small_delta(policy, settings, len(data.train))
        with refuse_as(Code.LEDGER_UNREADABLE, Code.BUDGET_EXCEEDED):
            ledger = site_ledger(settings, instruction.run_id, who.partition, policy=policy)
            ledger.spend(noise, 1.0, 1)
    device, train = settle(model.model), settings.train
    with refuse_as(Code.TRAINING_FAILED):
        sums = collect(
            model.model,
            data.train,
            train.evaluation_batch_size,
            num_classes,
            width=settings.head.max_width,
            clip_norm=clip_norm if private else None,
            number_range=settings.number_range,
            autocast=lambda: autocast(device, train.precision),
            progress=stage("sum up features", on_step),
        )
        if private:
            sums = release(sums, noise, number=settings.model.kind.number)
    spent = settings.privacy.epsilon if private else None
    return StatisticsRelease(sums.to_tensors(), who.partition, spent).content(instruction.round)


def losses(
    site: Site, content: RecordDict, who: ClientIdentity, memory: RecordDict, on_step: OnStep | None = None
) -> RecordDict:
    """Evaluate every head of a message on the client's held-out part, in one pass over it."""
    _, model, data = receive(site, content, who, memory)
    with refuse_as(Code.MESSAGE_INVALID):
        flat = from_arrays(content.array_records[HEADS])
        count = sum(name.endswith("/weight") for name in flat)
        heads = {str(k): Head(flat[f"{k}/weight"].double(), _double(flat.get(f"{k}/bias"))) for k in range(count)}
    device, train = settle(model.model), site.settings.train
    with refuse_as(Code.TRAINING_FAILED):
        found = head_metrics(
            model.model,
            data.evaluation,
            train.evaluation_batch_size,
            heads,
            autocast=lambda: autocast(device, train.precision),
        )
    return HeadLossesRelease([found[name].loss for name in heads], who.partition, len(data.evaluation)).content()


def _double(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.double()
