"""Robust rules: their scores against dense distances, what they do to outliers, and that factors do not matter."""

import numpy as np
import pytest
import torch

from bora_fl.blocks import BlockFactors
from bora_fl.state import ALL, AdapterState, ClientUpdate, flatten
from bora_fl.strategies.products import gram_of_changes, squared_distances
from bora_fl.strategies.robust import RULES, RobustRound, krum_scores, weighted_median, weighted_trimmed_mean

every_fleet = pytest.mark.parametrize("fleet", ["bora exp_norm", "bora identity", "one block", "lora"])
every_rule = pytest.mark.parametrize("rule", list(RULES))


def dense_vector(state):
    flat = [f.dense().flatten() for f in state.layers.values()] + [t.flatten() for t in state.tensors.values()]
    return torch.cat(flat).numpy()


def attacked(fleets, fleet, agg, honest=6, scale=1000.0):
    """Honest clients near one another and one far away, with the last id or the first."""
    fed = fleets[fleet]
    fed.drift = 0.05
    state, updates = fed.round(agg, clients=honest, weights=[1.0] * honest)
    evil = fed.train(state.current, ALL, 999, size=scale)
    return state, [*updates, ClientUpdate(0, 1.0, evil)], updates


@every_fleet
def test_distances_are_those_of_the_dense_products(fleet, fleets):
    state, updates = fleets[fleet].round(fleets[fleet].built("fedavg"), clients=5)
    vectors = [dense_vector(u.state) - dense_vector(state.current) for u in updates]
    gram = gram_of_changes([u.state for u in updates], state.current)
    np.testing.assert_allclose(
        gram.numpy(), np.array([[a @ b for b in vectors] for a in vectors]), rtol=1e-9, atol=1e-9
    )
    wanted = np.array([[np.sum((a - b) ** 2) for b in vectors] for a in vectors])
    np.testing.assert_allclose(squared_distances(gram).numpy(), wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["fed-sb", "ffa", "rolora"])
def test_distances_are_those_of_the_products_where_one_factor_is_shared(name, fleets):
    agg = fleets["bora exp_norm"].built(name)
    state, updates = fleets["bora exp_norm"].round(agg, clients=3)
    vectors = [dense_vector(u.state) - dense_vector(state.current) for u in updates]
    gram = gram_of_changes([u.state for u in updates], state.current, agg.shares())
    np.testing.assert_allclose(
        gram.numpy(), np.array([[a @ b for b in vectors] for a in vectors]), rtol=1e-9, atol=1e-9
    )


def test_an_update_is_clipped_to_nothing_where_most_clients_changed_nothing(fleets):
    agg = fleets["bora exp_norm"].built("fedavg", robust="norm-clip")
    state, updates = fleets["bora exp_norm"].round(agg, clients=1)
    idle = [ClientUpdate(8, 1.0, state.current), ClientUpdate(9, 1.0, state.current)]
    after, report = agg.aggregate(state, [*updates, *idle], 1)
    assert report["clients"] == 3
    assert report["update_norm"] == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(dense_vector(after.current), dense_vector(state.current), rtol=1e-9, atol=1e-12)


def test_krum_scores_follow_their_definition(fleets):
    state, updates = fleets["bora exp_norm"].round(fleets["bora exp_norm"].built("fedavg"), clients=7)
    vectors = [dense_vector(u.state) for u in updates]
    scores = krum_scores(RobustRound(updates, state.current, byzantine=2))
    for k, mine in enumerate(vectors):
        others = sorted(np.sum((mine - other) ** 2) for j, other in enumerate(vectors) if j != k)
        assert float(scores[k]) == pytest.approx(sum(others[: 7 - 2 - 2]), rel=1e-8)


@every_fleet
@every_rule
def test_a_far_away_client_has_little_say(fleet, rule, fleets, dense):
    agg, plain = fleets[fleet].built("fedavg", robust=rule), fleets[fleet].built("fedavg")
    state, everyone, honest = attacked(fleets, fleet, agg)
    wanted = dense.mean_product(honest)
    robust, _ = agg.aggregate(state, everyone, 1)
    naive, _ = plain.aggregate(state, everyone, 1)
    assert dense.gap(dense.model(robust), wanted) < 0.1 * dense.gap(dense.model(naive), wanted)


@every_fleet
@every_rule
def test_identical_clients_pass_every_rule(fleet, rule, fleets, dense):
    agg = fleets[fleet].built("fedavg", robust=rule)
    state, (only,) = fleets[fleet].round(agg, clients=1)
    twins = [ClientUpdate(k, 1.0 + k, only.state) for k in range(5)]
    after, _ = agg.aggregate(state, twins, 1)
    assert dense.gap(dense.model(after), dense.mean_product(twins)) < 1e-6
    torch.testing.assert_close(after.current.tensors["head"], only.state.tensors["head"])


@every_rule
@pytest.mark.parametrize("name", ["refactor", "flora", "ffa", "fedsa", "cyclic"])
def test_rules_compose_with_every_kind_of_merge(name, rule, fleets):
    agg = fleets["bora exp_norm"].built(name, robust=rule)
    state, updates = fleets["bora exp_norm"].round(agg, clients=5)
    first, report = agg.aggregate(state, updates, 1)
    second, _ = agg.aggregate(state, updates[::-1], 1)
    for key, tensor in flatten(first.current).items():
        assert torch.equal(tensor, flatten(second.current)[key])
        assert bool(torch.isfinite(tensor).all())
    assert report["clients"] + report["set_aside"] == 5
    assert not agg.linear


@pytest.mark.parametrize("rule", ["krum", "multi-krum", "norm-clip"])
def test_distances_do_not_see_how_an_update_is_factored(rule, fleets, dense):
    agg = fleets["lora"].built("fedavg", robust=rule)
    state, everyone, _ = attacked(fleets, "lora", agg)
    refactored = []
    for k, update in enumerate(everyone):
        f = update.state.layers["query"]
        Q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(k), dtype=torch.float64)).Q
        turned = BlockFactors(f.B @ Q, f.sigma, Q.T @ f.A, f.scaling)
        refactored.append(
            ClientUpdate(update.client, update.weight, AdapterState({"query": turned}, update.state.tensors))
        )
    robust = RobustRound(everyone, state.current)
    other = RobustRound(refactored, state.current)
    assert [u.client for u in RULES[rule](robust)] == [u.client for u in RULES[rule](other)]
    torch.testing.assert_close(krum_scores(robust), krum_scores(other))
    assert dense.gap(dense.mean_product(refactored), dense.mean_product(everyone)) < 1e-9


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_coordinate_rules_first_align_the_factors(rule, fleets, dense):
    """Rotated copies of one update have that update as their median."""
    agg = fleets["lora"].built("fedavg", robust=rule)
    state, (only,) = fleets["lora"].round(agg, clients=1)
    f, updates = only.state.layers["query"], []
    for k in range(5):
        Q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(k), dtype=torch.float64)).Q
        turned = BlockFactors(f.B @ Q, f.sigma, Q.T @ f.A, f.scaling)
        updates.append(ClientUpdate(k, 1.0, AdapterState({"query": turned}, only.state.tensors)))
    after, _ = agg.aggregate(state, updates, 1)
    assert dense.gap(dense.model(after), {"query": f.dense()}) < 1e-9


@every_fleet
def test_clipped_updates_are_within_the_median_norm(fleet, fleets):
    agg = fleets[fleet].built("fedavg", robust="norm-clip")
    state, everyone, _ = attacked(fleets, fleet, agg)
    norms = gram_of_changes([u.state for u in everyone], state.current).diagonal().sqrt()
    clipped = RULES["norm-clip"](RobustRound(everyone, state.current, sigma_transform=agg.adapter.transform))
    after = gram_of_changes([u.state for u in clipped], state.current).diagonal().sqrt()
    assert float(after.max()) <= float(norms.median()) * (1 + 1e-5)
    unchanged = norms <= norms.median()
    torch.testing.assert_close(after[unchanged], norms[unchanged])
    assert float(after[-1]) >= 0.98 * float(norms.median())  # shortened, not thrown away


def test_the_median_of_equal_weights_is_the_median():
    values = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(weighted_median(values, torch.ones(5)), values.median(0).values)
    even = values[:4]
    np.testing.assert_allclose(weighted_median(even, torch.full((4,), 2.0)).numpy(), np.median(even.numpy(), axis=0))


def test_a_weight_of_two_counts_as_two_clients():
    values = torch.randn(4, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([2.0, 1.0, 3.0, 1.0], dtype=torch.float64)
    repeated = values.repeat_interleave(weights.long(), dim=0)
    np.testing.assert_allclose(weighted_median(values, weights).numpy(), np.median(repeated.numpy(), axis=0))


def test_the_trimmed_mean_drops_both_ends():
    values = torch.tensor([[1.0], [2.0], [3.0], [1000.0], [-1000.0]], dtype=torch.float64)
    assert float(weighted_trimmed_mean(values, torch.ones(5, dtype=torch.float64), 1)) == 2.0
    weights = torch.tensor([1.0, 1.0, 2.0, 9.0, 9.0], dtype=torch.float64)
    assert float(weighted_trimmed_mean(values, weights, 1)) == pytest.approx(9 / 4)
    assert float(weighted_trimmed_mean(values[:3], torch.ones(3, dtype=torch.float64), 0)) == 2.0


def test_clients_of_another_rank_are_rejected_where_entries_are_compared(fleets):
    fed = fleets["bora exp_norm"]
    agg = fleets["bora exp_norm"].built("flora", robust="median")
    state, updates = fed.round(agg, clients=4)
    f = updates[0].state.layers["query"]
    small = AdapterState({"query": BlockFactors(f.B[:, :2], f.sigma[..., :2], f.A[:2], 2.0)}, updates[0].state.tensors)
    mixed = [ClientUpdate(5, 1.0, small), *updates]
    assert "compares entries" in agg.refuses(mixed[0], state)
    _, report = agg.aggregate(state, mixed, 1)
    assert (report["clients"], report["set_aside"]) == (4, 1)
    _, report = fleets["bora exp_norm"].built("flora", robust="norm-clip").aggregate(state, mixed, 1)
    assert (report["clients"], report["set_aside"]) == (5, 0)


def test_krum_picks_one_and_multi_krum_leaves_the_assumed_number_out(fleets):
    fed = fleets["lora"]
    for rule, chosen in (("krum", 1), ("multi-krum", 5)):
        agg = fleets["lora"].built("fedavg", robust=rule, byzantine=2)
        state, everyone, _ = attacked(fleets, "lora", agg)
        _, report = agg.aggregate(state, everyone, 1)
        assert (report["clients"], report["set_aside"]) == (chosen, 7 - chosen)
        assert 0 not in [u.client for u in RULES[rule](RobustRound(everyone, state.current, byzantine=2))]
    assert fed.rank == 4
