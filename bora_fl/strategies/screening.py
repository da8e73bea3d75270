"""Reject updates that claim too much, moved implausibly far, against everyone else or to a worse model."""

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

from bora_fl.config import StrategySettings
from bora_fl.report import ClientMetrics
from bora_fl.state import ALL, AdapterState, ClientUpdate
from bora_fl.strategies.layer_merge import Trains
from bora_fl.strategies.products import gram_of_changes
from bora_fl.strategies.server_state import ServerState


def screen(
    updates: Sequence[ClientUpdate],
    state: ServerState,
    settings: StrategySettings,
    shares: Trains = ALL,
    loss: Callable[[AdapterState], float] | None = None,
) -> tuple[list[ClientUpdate], dict[int, str]]:
    """Apply `max_weight_ratio`, `max_update_norm`, `min_cosine` and `max_loss_increase`, in this order.

    Each compares with those that have passed the ones before it, so that one absurd reply cannot hide another.

    Args:
        updates: The round's checked replies.
        state: What the clients trained on is `state.current`.
        settings: An update is rejected if its weight is above `max_weight_ratio` times the median one (0: off), if the
            change of its products and other tensors has a Frobenius norm above `max_update_norm` (0: off) or a cosine
            with the weighted mean change of the others below `min_cosine` (−1: off), or if its model's held-out loss
            is more than `max_loss_increase` above that of what was sent (0: off).
        shares: The parts that leave the clients.
        loss: The held-out loss of a model; needed for `max_loss_increase`.

    Returns:
        The accepted updates in their order, and for each other client the reason in words.
    """
    passed = list(updates)
    reasons: dict[int, str] = {}

    def reject(found: dict[int, str]) -> None:
        reasons.update(found)
        passed[:] = [update for update in passed if update.client not in found]

    reject(heavy({update.client: update.weight for update in passed}, settings.max_weight_ratio))
    if settings.max_update_norm > 0 or settings.min_cosine > -1:
        reject(_far_or_against(passed, state, settings, shares))
    if settings.max_loss_increase > 0 and loss is not None and passed:
        reject(_worse(passed, state, settings.max_loss_increase, loss))
    return passed, reasons


def heavy(examples: Mapping[int, float], ratio: float) -> dict[int, str]:
    """Who claims more than `ratio` times the median's examples, and that in words; a ratio of 0 is off."""
    median = statistics.median_low(examples.values()) if examples else 0.0
    return {
        who: f"it claims {count:g} examples, above strategy.max-weight-ratio = {ratio:g} times the median client's "
        f"{median:g}"
        for who, count in examples.items()
        if 0 < ratio * median < count
    }


def _far_or_against(
    updates: Sequence[ClientUpdate], state: ServerState, settings: StrategySettings, shares: Trains
) -> dict[int, str]:
    if not updates:
        return {}
    reasons: dict[int, str] = {}
    gram = gram_of_changes([update.state for update in updates], state.current, shares)
    norms = gram.diagonal().clamp_min(0).sqrt()
    weights = torch.tensor([update.weight for update in updates], dtype=torch.float64)
    for k, update in enumerate(updates):
        if 0 < settings.max_update_norm < float(norms[k]):
            reasons[update.client] = (
                f"its update has norm {float(norms[k]):.4g}, above strategy.max-update-norm = "
                f"{settings.max_update_norm:g}"
            )
            weights[k] = 0.0
    if settings.min_cosine > -1:
        for k, update in enumerate(updates):
            others = weights.clone()
            others[k] = 0.0
            size = float((others @ gram @ others).clamp_min(0).sqrt() * norms[k])
            if update.client in reasons or size == 0:
                continue
            cosine = float(gram[k] @ others) / size
            if cosine < settings.min_cosine:
                reasons[update.client] = (
                    f"its update has cosine {cosine:.3f} with the others' mean, below strategy.min-cosine = "
                    f"{settings.min_cosine:g}"
                )
    return reasons


def _worse(
    updates: Sequence[ClientUpdate], state: ServerState, increase: float, loss: Callable[[AdapterState], float]
) -> dict[int, str]:
    before = loss(state.current)
    found = {update.client: loss(update.state) for update in updates}
    return {
        client: f"its model has a held-out loss of {after:.4g}, more than strategy.max-loss-increase = {increase:g} "
        f"above the {before:.4g} of what it was sent"
        for client, after in found.items()
        if not after <= before + increase
    }


def credible(metrics: Mapping[int, ClientMetrics], max_ratio: float) -> dict[int, ClientMetrics]:
    """What clients report of their held-out parts, less those that claim more examples than `heavy` allows."""
    liars = heavy({client: m.eval_examples or 0.0 for client, m in metrics.items() if m.eval_examples}, max_ratio)
    return {client: m for client, m in metrics.items() if client not in liars}
