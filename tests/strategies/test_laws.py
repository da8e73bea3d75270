"""The laws that every strategy keeps (`bora_fl.testing`), and what some keep besides."""

import pytest
import torch

from bora_fl.blocks import BlockFactors, at_rank, factor_mean, truncate
from bora_fl.state import AdapterState, ClientUpdate
from bora_fl.strategies.presets import PRESETS
from bora_fl.strategies.server_state import ServerState
from bora_fl.testing import FLEETS, LAWS, check

ONE_BLOCK = [name for name in FLEETS if not name.startswith("bora")]
# For b > 1 it gives up the block diversity of a single client too.
ON_ONE_BLOCK_ALONE = {("flexlora", "one_client_is_a_no_op")}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", PRESETS)
def test_a_strategy_keeps_the_law(name: str, law: str):
    check(name, law, ONE_BLOCK if (name, law) in ON_ONE_BLOCK_ALONE else list(FLEETS))


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


every_fleet = pytest.mark.parametrize("fleet", FLEETS)
every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)


@every_fleet
@every_spectrum
@pytest.mark.parametrize(
    ("name", "smaller"),
    [(n, smaller) for n in NEVER_WORSE for smaller in (False, True) if not (smaller and PRESETS[n].same_rank)],
)
def test_a_correction_is_never_worse_than_the_factor_mean(name, smaller, spectrum, fleet, fleets, dense):
    agg = fleets[fleet].built(name, threshold=1.0, sweeps=5)
    state, updates = mixed_fleet(fleets[fleet], agg, spectrum, smaller=smaller)
    total = sum(u.weight for u in updates)
    mean = factor_mean([u.state.layers["query"] for u in updates], [u.weight / total for u in updates])
    wanted = dense.mean_product(updates)
    found = dense.gap(dense.model(agg.aggregate(state, updates, 1)[0]), wanted)
    assert found <= dense.gap({"query": mean.dense()}, wanted) + 1e-12


@pytest.mark.parametrize("fleet", ONE_BLOCK)
@every_spectrum
@pytest.mark.parametrize("name", TRUNCATED_SVD)
def test_one_block_is_the_truncated_svd(name, spectrum, fleet, fleets, dense):
    agg = fleets[fleet].built(name, threshold=1.0, sweeps=5)
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
    agg = fed.built("hetlora")
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
