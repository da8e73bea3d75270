"""A client's round under record-level differential privacy: noise solved once, spent in the ledger, then trained."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from bora_fl.client.losses import sample_losses
from bora_fl.client.optimizers import make_optimizer, num_steps
from bora_fl.config import Settings
from bora_fl.data import Encoded
from bora_fl.device import autocast, settle
from bora_fl.heads import release_noise
from bora_fl.models import FederatedModel
from bora_fl.privacy.accounting import Spent, solve_noise
from bora_fl.privacy.ledger import planned_rounds, site_ledger
from bora_fl.privacy.policy import SitePolicy, require_small_delta
from bora_fl.wire.refusals import Code, refuse_as

_GRID = 1.05  # the noise multiplier is a power of it


def planned_steps(settings: Settings, num_examples: int) -> int:
    """Steps that a client takes over the whole run if it is sampled as often as ``strategy.fraction-train`` expects."""
    return planned_rounds(settings) * num_steps(settings.train, num_examples)


def noise_multiplier(settings: Settings, num_examples: int) -> float:
    """``privacy.noise-multiplier``, else one with which the planned steps stay within the budget.

    The least such noise is a function of the number of records, and its scale can be read off a reply. It is raised to
    the next power of 1.05: of data sets of about a thousand records, all but one in a hundred have the same noise as
    with one record more.
    """
    privacy = settings.privacy
    if privacy.noise_multiplier:
        return privacy.noise_multiplier
    rate = _expected_batch(settings, num_examples) / num_examples
    steps = planned_steps(settings, num_examples)
    head = (Spent(release_noise(settings), 1.0, 1),) if settings.solves_head else ()
    least = solve_noise(privacy.epsilon, privacy.delta, rate, steps, privacy.accountant, head)
    return _GRID ** math.ceil(math.log(least, _GRID))


def train_privately_for_a_round(
    model: FederatedModel,
    data: Encoded,
    settings: Settings,
    *,
    factors: Sequence[float] = (1.0,),
    run_id: str,
    partition: int,
    policy: SitePolicy | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, float | int]:
    """Train with DP-SGD for one round; the steps are on disk in the site's ledger before the first record is read.

    Args:
        model: Holds the received state, with what trains chosen; is trained in place.
        data: The client's training examples, one record each.
        settings: The run's settings, as the site grants them.
        factors: Shares of the learning rate, from `learning_rate_factors`.
        run_id: The run, under which the steps are booked.
        partition: The client's partition; with the data's files it names the ledger where the site has no policy.
        policy: The site's.
        on_step: Called with (step, steps) after each step; what it raises ends the training, and the steps stay booked.

    Returns:
        For the site's own log: ε spent on this data set so far by all runs, the noise multiplier, the steps. They
        follow from the sampling rate, which tells the number of records.

    Raises:
        BudgetExceeded: If the steps do not fit into the budget; nothing is trained.
        Refused: If the ledger on disk cannot be read, or δ is too large for so few records.
    """
    from bora_fl.client.dpsgd import train_privately  # Opacus is there with an extra alone

    require_small_delta(policy, settings, len(data))
    privacy, train = settings.privacy, settings.train
    device = settle(model.model)
    with refuse_as(Code.LEDGER_UNREADABLE):
        ledger = site_ledger(settings, run_id, partition, policy=policy)
    noise = noise_multiplier(settings, len(data))

    def collate(indices: list[int]) -> dict[str, Tensor]:
        return {name: tensor.to(device) for name, tensor in data.batch(np.array(indices)).items()}

    def losses(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        inputs: dict[str, Any] = dict(batch)
        labels = inputs.pop("labels")
        with autocast(device, train.precision):
            logits = module(**inputs).logits
        return sample_losses(logits, labels)

    model.model.train()
    result = train_privately(
        model.model,
        losses,
        range(len(data)),
        collate,
        make_optimizer(model, train, factors),
        clip_norm=privacy.clip_norm,
        noise_multiplier=noise,
        expected_batch_size=_expected_batch(settings, len(data)),
        physical_batch_size=privacy.physical_batch_size or 2 * train.batch_size,
        steps=num_steps(train, len(data)),
        spend=ledger.spend,
        on_step=on_step,
    )
    return {"epsilon-per-record": ledger.epsilon(), "noise-multiplier": noise, "steps": result.steps}


def _expected_batch(settings: Settings, num_examples: int) -> float:
    return float(min(settings.train.batch_size * settings.train.accumulation, num_examples))
