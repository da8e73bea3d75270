"""Screening: what is rejected, and why, in words."""

import pytest

from bora_fl.config import StrategySettings
from bora_fl.state import ALL, ClientUpdate
from bora_fl.strategies.products import gram_of_changes
from bora_fl.strategies.screening import screen


@pytest.fixture
def played(fleets):
    """Four clients that moved the same way by different amounts, one that moved against them, one that went far."""
    fed = fleets["bora exp_norm"]
    fed.drift = 0.02
    state, _ = fed.round(fed.built("fedavg"))
    sizes = {1: 1.0, 2: 1.2, 3: 0.9, 4: 1.1, 5: -1.0, 6: 40.0}
    updates = [ClientUpdate(client, 1.0, fed.train(state.current, ALL, 3, size)) for client, size in sizes.items()]
    return state, updates


def test_nothing_is_screened_by_default(played):
    state, updates = played
    assert screen(updates, state, StrategySettings()) == (updates, {})
    assert screen([], state, StrategySettings(max_update_norm=1.0)) == ([], {})


def test_an_update_that_moved_too_far_is_rejected(played):
    state, updates = played
    norms = gram_of_changes([u.state for u in updates], state.current).diagonal().sqrt()
    bound = float(norms[:5].max()) * 1.01
    accepted, reasons = screen(updates, state, StrategySettings(max_update_norm=bound))
    assert [u.client for u in accepted] == [1, 2, 3, 4, 5]
    assert set(reasons) == {6}
    assert f"{float(norms[5]):.4g}" in reasons[6]
    assert "strategy.max-update-norm" in reasons[6]


def test_an_update_against_the_others_is_rejected(played):
    state, updates = played
    accepted, reasons = screen(updates[:5], state, StrategySettings(min_cosine=0.0))
    assert [u.client for u in accepted] == [1, 2, 3, 4]
    assert set(reasons) == {5}
    assert "cosine -" in reasons[5]
    assert "strategy.min-cosine" in reasons[5]


def test_a_huge_update_does_not_turn_the_others_mean(played):
    state, updates = played
    against = [*updates[:4], ClientUpdate(7, 1.0, updates[5].state), updates[4]]
    bound = 2 * float(gram_of_changes([updates[1].state], state.current).sqrt())
    accepted, reasons = screen(against, state, StrategySettings(max_update_norm=bound, min_cosine=0.0))
    assert [u.client for u in accepted] == [1, 2, 3, 4]
    assert set(reasons) == {5, 7}
    assert "norm" in reasons[7]
    assert "cosine" in reasons[5]


def test_a_single_client_has_no_others_to_disagree_with(played):
    state, updates = played
    assert screen(updates[4:5], state, StrategySettings(min_cosine=0.9)) == (updates[4:5], {})


def test_a_claim_of_absurdly_many_examples_is_rejected(played):
    state, updates = played
    updates[2] = ClientUpdate(3, 5000.0, updates[2].state)
    accepted, reasons = screen(updates, state, StrategySettings())
    assert [u.client for u in accepted] == [1, 2, 4, 5, 6]
    assert "5000 examples" in reasons[3]
    assert "strategy.max-weight-ratio" in reasons[3]
    assert screen(updates, state, StrategySettings(max_weight_ratio=0.0)) == (updates, {})


def test_a_model_that_is_worse_on_held_out_examples_is_rejected(played):
    state, updates = played
    losses = {id(update.state): 1.0 + 0.1 * update.client for update in updates} | {id(state.current): 1.2}
    losses[id(updates[4].state)] = float("nan")
    settings = StrategySettings(max_loss_increase=0.25)
    accepted, reasons = screen(updates, state, settings, loss=lambda s: losses[id(s)])
    assert [u.client for u in accepted] == [1, 2, 3, 4]
    assert set(reasons) == {5, 6}
    assert "1.6" in reasons[6]
    assert "1.2" in reasons[6]
