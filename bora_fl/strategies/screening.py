"""Set aside updates that moved implausibly far or against everyone else, before anything is merged."""

from collections.abc import Sequence

import torch

from bora_fl.config import StrategySettings
from bora_fl.state import ClientUpdate
from bora_fl.strategies.aggregation import ServerState
from bora_fl.strategies.layer_merge import ALL, Trains
from bora_fl.strategies.products import gram_of_changes


def screen(
    updates: Sequence[ClientUpdate], state: ServerState, settings: StrategySettings, shares: Trains = ALL
) -> tuple[list[ClientUpdate], dict[int, str]]:
    """Apply `max_update_norm` and `min_cosine`.

    Args:
        updates: The round's checked replies.
        state: What the clients trained on is `state.current`.
        settings: An update is set aside if the change of its products and other tensors has a Frobenius norm above
            `max_update_norm` (0: off), or a cosine with the weighted mean change of the others that are within the norm
            below `min_cosine` (−1: off). Norms come first, so that one huge update cannot turn the mean of the others.
        shares: The parts that leave the clients.

    Returns:
        The accepted updates in their order, and for each other client the reason in words.
    """
    reasons: dict[int, str] = {}
    if not updates or (settings.max_update_norm == 0 and settings.min_cosine == -1):
        return list(updates), reasons
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
    return [update for update in updates if update.client not in reasons], reasons
