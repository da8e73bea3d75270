"""Laws that every strategy keeps, in one table: all presets × BoRA (both transforms), one block, plain LoRA."""

from dataclasses import replace

import pytest
import torch

from bora_fl.adapters.sigma import to_raw
from bora_fl.blocks import BlockFactors, at_rank, factor_mean, truncate
from bora_fl.state import AdapterState, ClientUpdate, flatten
from bora_fl.strategies.aggregation import Aggregator
from bora_fl.strategies.presets import PRESETS
from bora_fl.strategies.server_state import ServerState

FLEET_NAMES = ("bora exp_norm", "bora identity", "one block", "one block identity", "lora")
CASES = [(name, fleet) for name in PRESETS for fleet in FLEET_NAMES if not (fleet == "lora" and PRESETS[name].no_lora)]
every_case = pytest.mark.parametrize(("name", "fleet"), CASES)
TOLERANCE = 1e-6  # relative, float64


def aggregator(name, fed, **settings) -> Aggregator:
    return fed.built(name, threshold=1.0, sweeps=5, **settings)  # at threshold 1 florist keeps every component


def one_says(name: str, fleet: str, round: int) -> bool:
    """Whether a round with a single client must end in that client's product."""
    return not (name == "fedsa" or (name == "flexlora" and fleet.startswith("bora")))


def rounds_of(agg: Aggregator) -> list[int]:
    return list(range(1, len(agg.preset.schedule) + 1))


@every_case
def test_one_client_is_a_no_op(name, fleet, fleets, dense):
    agg = aggregator(name, fleets[fleet])
    for round in rounds_of(agg):
        state, updates = fleets[fleet].round(agg, clients=1, round=round)
        after, report = agg.aggregate(state, updates, round)
        torch.testing.assert_close(after.current.tensors["head"], updates[0].state.tensors["head"])
        if name == "fedsa":
            torch.testing.assert_close(after.current.layers["query"].A, updates[0].state.layers["query"].A)
        if one_says(name, fleet, round):
            assert dense.gap(dense.model(after), dense.mean_product(updates)) < TOLERANCE
            assert report["merge_error"] < TOLERANCE


@every_case
def test_identical_clients_are_a_no_op(name, fleet, fleets, dense):
    agg = aggregator(name, fleets[fleet])
    for round in rounds_of(agg):
        state, (only,) = fleets[fleet].round(agg, clients=1, round=round)
        twins = [replace(only, client=k, weight=w) for k, w in enumerate((1.0, 5.0, 2.5))]
        alone, _ = agg.aggregate(state, [only], round)
        after, _ = agg.aggregate(state, twins, round)
        assert dense.gap(dense.model(after), dense.model(alone)) < TOLERANCE or name == "fedsa"
        if name not in {
            "refactor",
            "regmean",
            "flexlora",
            "florist",
        }:  # which may factor the same product in another way
            factors = after.current.layers["query"], alone.current.layers["query"]
            torch.testing.assert_close(factors[0].A, factors[1].A, rtol=1e-5, atol=1e-7)


@every_case
def test_the_order_of_clients_does_not_matter(name, fleet, fleets):
    agg = aggregator(name, fleets[fleet])
    state, updates = fleets[fleet].round(agg)
    first, _ = agg.aggregate(state, updates, 1)
    second, _ = agg.aggregate(state, [updates[k] for k in (2, 0, 3, 1)], 1)
    a, b = flatten(first.current), flatten(second.current)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert first.fold.keys() == second.fold.keys()


@every_case
def test_only_the_ratio_of_weights_matters(name, fleet, fleets, dense):
    agg = aggregator(name, fleets[fleet])
    state, updates = fleets[fleet].round(agg)
    heavier = [replace(u, weight=7 * u.weight) for u in updates]
    first, _ = agg.aggregate(state, updates, 1)
    second, _ = agg.aggregate(state, heavier, 1)
    if name == "fedsa":
        torch.testing.assert_close(first.current.layers["query"].A, second.current.layers["query"].A)
    else:
        assert dense.gap(dense.model(second), dense.model(first)) < TOLERANCE


@every_case
def test_weights_are_not_ignored(name, fleet, fleets):
    agg = aggregator(name, fleets[fleet])
    state, updates = fleets[fleet].round(agg)
    skewed = [replace(u, weight=w) for u, w in zip(updates, (100.0, 1.0, 1.0, 1.0), strict=True)]
    first, second = agg.aggregate(state, updates, 1)[0], agg.aggregate(state, skewed, 1)[0]
    a = flatten(first.current) | {f"fold/{n}": f.dense() for n, f in first.fold.items()}
    b = flatten(second.current) | {f"fold/{n}": f.dense() for n, f in second.fold.items()}
    assert any(not torch.allclose(a[key], b[key], rtol=1e-3) for key in a if not key.startswith("tensors/"))


@every_case
def test_a_client_of_tiny_weight_changes_next_to_nothing(name, fleet, fleets, dense):
    agg = aggregator(name, fleets[fleet])
    state, updates = fleets[fleet].round(agg)
    fed = fleets[fleet]
    stranger = ClientUpdate(99, 1e-10, fed.train(state.current, agg.trains(1), 77, size=3.0), fed.grams(agg.gram, 77))
    without, _ = agg.aggregate(state, updates, 1)
    after, _ = agg.aggregate(state, [*updates, stranger], 1)
    if name == "fedsa":
        torch.testing.assert_close(after.current.layers["query"].A, without.current.layers["query"].A)
    else:
        assert dense.gap(dense.model(after), dense.model(without)) < TOLERANCE


@pytest.mark.parametrize(("name", "fleet"), [case for case in CASES if PRESETS[case[0]].exact])
def test_exact_strategies_reproduce_the_mean_product(name, fleet, fleets, dense):
    agg = aggregator(name, fleets[fleet])
    for round in rounds_of(agg):
        state, updates = fleets[fleet].round(agg, round=round)
        after, report = agg.aggregate(state, updates, round)
        assert dense.gap(dense.model(after), dense.mean_product(updates)) < TOLERANCE
        assert report["merge_error"] < TOLERANCE


@every_case
def test_the_report_measures_the_distance_to_the_mean_product(name, fleet, fleets, dense):
    agg = aggregator(name, fleets[fleet])
    state, updates = fleets[fleet].round(agg)
    after, report = agg.aggregate(state, updates, 1)
    assert (report["clients"], report["set_aside"]) == (4, 0)
    if name == "fedsa":
        assert "merge_error" not in report
        return
    found, wanted = dense.model(after), dense.mean_product(updates)
    error = sum(float((found[n] - wanted[n]).square().sum()) for n in wanted) ** 0.5
    target = sum(float(wanted[n].square().sum()) for n in wanted) ** 0.5
    moved = sum(float((wanted[n] - f.dense()).square().sum()) for n, f in state.current.layers.items()) ** 0.5
    assert report["merge_error"] == pytest.approx(error / target, abs=1e-7)
    assert report["update_norm"] == pytest.approx(moved, rel=1e-6)


@every_case
def test_the_adapter_keeps_its_form(name, fleet, fleets):
    agg = aggregator(name, fleets[fleet])
    for round in rounds_of(agg):
        state, updates = fleets[fleet].round(agg, round=round)
        after, _ = agg.aggregate(state, updates, round)
        after = agg.prepare(after, round + 1)
        for layer, f in after.current.layers.items():
            before = state.current.layers[layer]
            assert (f.shape, f.num_blocks, f.scaling) == (before.shape, before.num_blocks, before.scaling)
            assert f.rank == before.rank
            assert f.B.dtype == f.sigma.dtype == f.A.dtype == torch.float64
            assert all(bool(torch.isfinite(t).all()) for t in (f.B, f.sigma, f.A))
            to_raw(f.sigma, agg.adapter.transform)  # raises where the transform cannot reach Sigma
            if fleet == "lora":
                assert bool((f.sigma == 1).all())


@every_case
def test_inputs_are_left_alone(name, fleet, fleets):
    agg = aggregator(name, fleets[fleet])
    state, updates = fleets[fleet].round(agg)
    copies = [{k: t.clone() for k, t in flatten(s).items()} for s in (state.current, *(u.state for u in updates))]
    agg.aggregate(state, updates, 1)
    for copy, now in zip(copies, (state.current, *(u.state for u in updates)), strict=True):
        assert all(torch.equal(copy[key], tensor) for key, tensor in flatten(now).items())


@every_case
@pytest.mark.parametrize("trained", [False, True], ids=["B = 0", "B trained"])
def test_preparing_does_not_change_the_model(name, fleet, trained, fleets):
    agg = aggregator(name, fleets[fleet])
    start = ServerState.start(fleets[fleet].initial(trained=trained))
    for round in rounds_of(agg):
        ready = agg.prepare(start, round)
        again = agg.prepare(ready, round)
        for layer, f in start.current.layers.items():
            for state in (ready, again):
                update = state.current.layers[layer].dense()
                update = update + (state.fold[layer].dense() if layer in state.fold else 0.0)
                torch.testing.assert_close(update, f.dense(), rtol=1e-9, atol=1e-10)
        assert again.fold_version == ready.fold_version == bool(ready.fold)


@every_case
def test_a_second_round_goes_on_from_the_first(name, fleet, fleets, dense):
    agg = aggregator(name, fleets[fleet])
    fed = fleets[fleet]
    state, updates = fed.round(agg, trained=False)
    state, _ = agg.aggregate(state, updates, 1)
    version = state.fold_version
    assert version == (1 if PRESETS[name].folds else 0)
    state = agg.prepare(state, 2)
    trained = [fed.train(state.current, agg.trains(2), 50 + k) for k in range(3)]
    updates = [ClientUpdate(k, 1.0, theirs, fed.grams(agg.gram, 50 + k)) for k, theirs in enumerate(trained)]
    after, report = agg.aggregate(state, updates, 2)
    assert after.fold_version == version + bool(after.fold)
    if PRESETS[name].exact:
        assert dense.gap(dense.model(after), dense.mean_product(updates)) < TOLERANCE
        assert report["merge_error"] < TOLERANCE


def test_float32_states_stay_float32_and_exact_to_its_rounding(fleets, dense):
    for name in (row for row in PRESETS if PRESETS[row].exact):
        agg = aggregator(name, fleets["bora exp_norm"])
        fleets["bora exp_norm"].dtype = torch.float32
        state, updates = fleets["bora exp_norm"].round(agg)
        after, _ = agg.aggregate(state, updates, 1)
        assert after.current.layers["query"].B.dtype == torch.float32
        assert dense.gap(dense.model(after), dense.mean_product(updates)) < 5e-6


def flat(B):
    return B


def steep(B):
    return B * torch.logspace(0, -3, B.shape[1], dtype=torch.float64)


def collinear(B):
    """Components of like energy whose sum has singular values over two decades."""
    return B[:, :1] + 0.02 * B


SPECTRA = {"flat": flat, "steep": steep, "collinear": collinear}
NEVER_WORSE = ("refactor", "lora-fair", "fedex", "flora")
TRUNCATED_SVD = ("refactor", "flexlora", "florist")


def mixed_fleet(fed, agg, spectrum: str, clients: int = 5, smaller: bool = True):
    """Drifting clients, the last of them of rank 2."""
    fed.drift = 0.002
    initial = fed.initial()
    f = initial.layers["query"]
    f = BlockFactors(SPECTRA[spectrum](f.B), f.sigma, f.A, f.scaling)
    state = ServerState.start(AdapterState({"query": f}, initial.tensors))
    updates = []
    for k in range(clients):
        rank = 2 if smaller and k == clients - 1 else f.rank
        sent = AdapterState(
            {"query": at_rank(state.current.layers["query"], rank, agg.adapter.transform)}, initial.tensors
        )
        updates.append(ClientUpdate(k, 1.0 + k, fed.train(sent, agg.trains(1), k + 1)))
    return state, updates


every_fleet = pytest.mark.parametrize("fleet", FLEET_NAMES)
every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)


@every_fleet
@every_spectrum
@pytest.mark.parametrize(
    ("name", "smaller"),
    [(n, smaller) for n in NEVER_WORSE for smaller in (False, True) if not (smaller and PRESETS[n].same_rank)],
)
def test_a_correction_is_never_worse_than_the_factor_mean(name, smaller, spectrum, fleet, fleets, dense):
    agg = aggregator(name, fleets[fleet])
    state, updates = mixed_fleet(fleets[fleet], agg, spectrum, smaller=smaller)
    total = sum(u.weight for u in updates)
    mean = factor_mean([u.state.layers["query"] for u in updates], [u.weight / total for u in updates])
    wanted = dense.mean_product(updates)
    found = dense.gap(dense.model(agg.aggregate(state, updates, 1)[0]), wanted)
    assert found <= dense.gap({"query": mean.dense()}, wanted) + 1e-12


@pytest.mark.parametrize("fleet", [name for name in FLEET_NAMES if not name.startswith("bora")])
@every_spectrum
@pytest.mark.parametrize("name", TRUNCATED_SVD)
def test_one_block_is_the_truncated_svd(name, spectrum, fleet, fleets, dense):
    agg = aggregator(name, fleets[fleet])
    state, updates = mixed_fleet(fleets[fleet], agg, spectrum)
    (mean,) = dense.mean_product(updates).values()
    U, S, Vt = torch.linalg.svd(mean)
    after, _ = agg.aggregate(state, updates, 1)
    assert dense.gap(dense.model(after), {"query": (U[:, :4] * S[:4]) @ Vt[:4]}) < 1e-9


@every_fleet
@every_spectrum
def test_padding_without_training_is_no_worse_than_truncation(spectrum, fleet, fleets, dense):
    fed = fleets[fleet]
    fed.rank = 8
    agg = aggregator("hetlora", fed)
    state, _ = mixed_fleet(fed, agg, spectrum, clients=1, smaller=False)
    f, transform = state.current.layers["query"], agg.adapter.transform

    def error(cut) -> float:
        layers = [f if rank == 8 else cut(rank) for rank in (8, 4, 4, 2)]
        sent = [AdapterState({"query": layer}, state.current.tensors) for layer in layers]
        updates = [ClientUpdate(k, 1.0, received) for k, received in enumerate(sent)]
        after, _ = agg.aggregate(state, updates, 1)
        return dense.gap(dense.model(after), dense.mean_product(updates))

    assert error(lambda rank: at_rank(f, rank, transform)) <= plain_truncation(f, dense) + 1e-9


def plain_truncation(f: BlockFactors, dense) -> float:
    """Error of the padded average of the leading components as they are."""
    leading = [truncate(f, rank).dense() for rank in (8, 4, 4, 2)]
    weights = torch.stack([product.norm() for product in leading])
    share = weights / weights.sum()
    order = f.component_energy().argsort(descending=True)
    held = torch.stack([share[[rank > k for rank in (8, 4, 4, 2)]].sum() for k in range(8)])
    merged = BlockFactors(f.B[:, order] * held, f.sigma[..., order], f.A[order] * held[:, None], f.scaling)
    mean = sum(leading) / 4
    return float((merged.dense() - mean).norm() / mean.norm())
