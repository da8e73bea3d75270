"""Every method against an independent dense computation in NumPy float64."""

import math

import numpy as np
import pytest
import torch

from bora_fl.blocks import BlockFactors, at_rank
from bora_fl.blocks.factors import rescaled
from bora_fl.blocks.gauge import block_row_norms
from bora_fl.config import ConfigError
from bora_fl.state import AdapterState, ClientUpdate
from bora_fl.strategies.alignment import align
from bora_fl.strategies.server_state import ServerState
from bora_fl.wire.sparsity import sparsify

LAYER = "query"
ROWS, COLUMNS = 24, 16


def parts(f):
    return f.B.numpy(), f.sigma.numpy(), f.A.numpy()


def product(B, sigma, A, scaling=2.0):
    """delta_W by its definition, block by block."""
    b = sigma.shape[0]
    rows, columns = B.shape[0] // b, A.shape[1] // b
    out = np.zeros((B.shape[0], A.shape[1]))
    for i in range(b):
        for j in range(b):
            left, right = B[i * rows : (i + 1) * rows], A[:, j * columns : (j + 1) * columns]
            out[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = left @ np.diag(sigma[i, j]) @ right
    return scaling * out


def dense(f):
    return product(*parts(f), f.scaling)


def play(fleet, name, round=1, trained=True, **settings):
    agg = fleet.built(name, **settings)
    state, updates = fleet.round(agg, round=round, trained=trained)
    after, report = agg.aggregate(state, updates, round)
    weights = np.array([u.weight for u in updates])
    clients = [parts(u.state.layers[LAYER]) for u in updates]
    return agg, state, after, report, weights / weights.sum(), clients


def total(after):
    update = dense(after.current.layers[LAYER])
    return update + (dense(after.fold[LAYER]) if LAYER in after.fold else 0.0)


def means(weights, clients):
    return [sum(w * c[part] for w, c in zip(weights, clients, strict=True)) for part in range(3)]


def mean_of_products(weights, clients):
    return sum(w * product(*c) for w, c in zip(weights, clients, strict=True))


def close(found, wanted, tolerance=1e-9):
    assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted)


ALL_FLEETS = pytest.mark.parametrize("fleet", ["bora exp_norm", "bora identity", "one block", "lora"])
ONE_BLOCK = pytest.mark.parametrize("fleet", ["one block", "lora"])


@ALL_FLEETS
@pytest.mark.parametrize("name", ["fedavg", "cellm"])
def test_fedavg_is_the_product_of_the_means(fleet, name, fleets):
    _, _, after, _, weights, clients = play(fleets[fleet], name)
    close(total(after), product(*means(weights, clients)))
    head = after.current.tensors["head"].numpy()
    assert head.shape == (3, 5)


def test_fedavg_averages_plain_lora_entry_by_entry(fleets):
    _, _, after, _, weights, clients = play(fleets["lora"], "fedavg")
    for found, wanted in zip(parts(after.current.layers[LAYER]), means(weights, clients), strict=True):
        close(found, wanted, 1e-12)


@ALL_FLEETS
@pytest.mark.parametrize("name", ["ffa", "fedsvd"])
def test_training_b_alone_averages_exactly(fleet, name, fleets):
    _, state, after, _, weights, clients = play(fleets[fleet], name)
    close(total(after), mean_of_products(weights, clients))
    assert torch.equal(after.current.layers[LAYER].A, state.current.layers[LAYER].A)
    assert torch.equal(after.current.layers[LAYER].sigma, state.current.layers[LAYER].sigma)


@ONE_BLOCK
def test_fedsvd_gives_the_right_singular_vectors_of_the_mean_product(fleet, fleets):
    agg, _, after, _, weights, clients = play(fleets[fleet], "fedsvd")
    f = agg.prepare(after, 2).current.layers[LAYER]
    mean = mean_of_products(weights, clients)
    close(f.A.numpy() @ f.A.numpy().T, np.eye(4))
    _, _, Vt = np.linalg.svd(mean)
    close(np.abs(f.A.numpy() @ Vt[:4].T), np.eye(4), 1e-7)
    close(dense(f), mean)


@ALL_FLEETS
@pytest.mark.parametrize("name", ["fedsvd", "cyclic", "fed-sb"])
def test_frozen_rows_are_orthonormal_from_the_start(fleet, name, fleets):
    if fleet == "lora" and name == "fed-sb":
        pytest.skip("plain LoRA has no core")
    _, state, _, _, _, _ = play(fleets[fleet], name, trained=False)
    b = fleets[fleet].blocks
    for A_j in np.split(state.current.layers[LAYER].A.numpy(), b, axis=1):
        close(A_j @ A_j.T, np.eye(4) / b)


@pytest.mark.parametrize("round", [1, 3])
@ONE_BLOCK
def test_cyclic_orthonormalizes_the_side_that_is_frozen(fleet, round, fleets):
    agg, state, after, _, _, _ = play(fleets[fleet], "cyclic", round=round)
    assert agg.trains(round) == {"B", "tensors"}
    close(state.current.layers[LAYER].A.numpy() @ state.current.layers[LAYER].A.numpy().T, np.eye(4))
    nxt = agg.prepare(after, round + 1).current.layers[LAYER]
    assert agg.trains(round + 1) == {"A", "tensors"}
    close(nxt.B.numpy().T @ nxt.B.numpy(), np.eye(4))
    close(dense(nxt), total(after))


def test_cyclic_brings_the_frozen_rows_of_blocks_to_norm(fleets):
    _, state, _, _, _, _ = play(fleets["bora exp_norm"], "cyclic", round=1)
    for A_j in np.split(state.current.layers[LAYER].A.numpy(), 4, axis=1):
        close(np.linalg.norm(A_j, axis=1), np.full(4, 0.5))


@ALL_FLEETS
def test_rolora_alternates(fleet, fleets):
    for round, frozen in ((1, "A"), (2, "B"), (3, "A")):
        agg, state, after, _, weights, clients = play(fleets[fleet], "rolora", round=round)
        assert frozen not in agg.trains(round)
        close(total(after), mean_of_products(weights, clients))
        assert torch.equal(getattr(after.current.layers[LAYER], frozen), getattr(state.current.layers[LAYER], frozen))


@pytest.mark.parametrize("fleet", ["bora exp_norm", "bora identity", "one block"])
@pytest.mark.parametrize(("name", "round"), [("fed-sb", 1), ("cyclic", 2)])
def test_training_sigma_alone_averages_exactly(fleet, name, round, fleets):
    if fleet == "one block" and name == "cyclic":
        pytest.skip("one block has no round for Sigma")
    agg, _, after, _, weights, clients = play(fleets[fleet], name, round=round, trained=name != "fed-sb")
    assert agg.trains(round) == {"sigma", "tensors"}
    close(dense(after.current.layers[LAYER]), mean_of_products(weights, clients))


def test_fed_sb_starts_without_changing_the_model(fleets):
    agg, state, _, _, _, _ = play(fleets["bora exp_norm"], "fed-sb", trained=False)
    f = state.current.layers[LAYER]
    assert float(f.B.abs().max()) > 0
    assert np.abs(dense(f) + dense(state.fold[LAYER])).max() < 1e-12
    assert state.fold_version == 1
    other = (
        fleets["bora exp_norm"]
        .built("fed-sb", seed=1)
        .prepare(ServerState.start(fleets["bora exp_norm"].initial(trained=False)), 1)
    )
    assert not torch.equal(other.current.layers[LAYER].B, f.B)
    assert agg.seed == 0


@ALL_FLEETS
def test_flora_folds_the_stack_and_restarts(fleet, fleets):
    _, state, after, _, weights, clients = play(fleets[fleet], "flora")
    f, fold = after.current.layers[LAYER], after.fold[LAYER]
    assert fold.rank == sum(c[2].shape[0] for c in clients)
    close(dense(fold), mean_of_products(weights, clients))
    assert not f.B.any()
    assert not torch.equal(f.A, state.current.layers[LAYER].A)
    assert 0.5 / COLUMNS**0.5 < float(f.A.abs().max()) <= 1 / COLUMNS**0.5


@ALL_FLEETS
def test_flexlora_gives_the_singular_vectors_of_the_mean_product(fleet, fleets):
    _, _, after, _, weights, clients = play(fleets[fleet], "flexlora")
    U, S, Vt = np.linalg.svd(mean_of_products(weights, clients))
    close(total(after), (U[:, :4] * S[:4]) @ Vt[:4])
    B, sigma, A = parts(after.current.layers[LAYER])
    sign = np.sign(np.sum(A * Vt[:4], axis=1))
    close(A, sign[:, None] * Vt[:4])
    close(sigma, np.full_like(sigma, sigma[0, 0, 0]))  # 1, or where exp_norm cannot reach that, alike everywhere
    close(2.0 * sigma[0, 0, 0] * B, sign * U[:, :4] * S[:4])


@ALL_FLEETS
@pytest.mark.parametrize("name", ["flexlora", "florist", "refactor"])
@pytest.mark.parametrize("how", ["B = 0", "the clients cancel"])
def test_a_mean_product_of_zero_gives_a_product_of_zero_that_can_be_trained(fleet, name, how, fleets):
    fed = fleets[fleet]
    state = ServerState.start(fed.initial())
    f = state.current.layers[LAYER]
    signs = (0.0, 0.0) if how == "B = 0" else (1.0, -1.0)
    clients = [BlockFactors(sign * f.B, f.sigma, f.A, f.scaling) for sign in signs]
    updates = [ClientUpdate(k, 1.0, AdapterState({LAYER: c}, state.current.tensors)) for k, c in enumerate(clients)]
    after, _ = fed.built(name).aggregate(state, updates, 1)
    found = after.current.layers[LAYER]
    assert np.linalg.norm(total(after)) < 1e-12 * np.linalg.norm(dense(f))
    assert found.rank == f.rank
    assert float(found.A.norm(dim=1).min()) > 0.01


@ALL_FLEETS
def test_hetlora_pads_and_weights_by_the_norm(fleet, fleets):
    fed = fleets[fleet]
    agg = fed.built("hetlora")
    initial = fed.initial()
    order = torch.argsort(initial.layers[LAYER].component_energy(), descending=True)
    f = initial.layers[LAYER]
    sorted_f = BlockFactors(f.B[:, order], f.sigma[..., order], f.A[order], f.scaling)
    state = ServerState.start(AdapterState({LAYER: sorted_f}, initial.tensors))
    updates = []
    clients = []
    for k, rank in enumerate((4, 2, 3)):
        theirs = fed.train(state.current, agg.trains(1), k).layers[LAYER]
        kept = BlockFactors(theirs.B[:, :rank], theirs.sigma[..., :rank], theirs.A[:rank], theirs.scaling)
        clients.append(parts(kept))
        received = at_rank(sorted_f, rank, fed.transform)  # a smaller client trains in scales of its own
        columns = block_row_norms(received) / block_row_norms(sorted_f)[:, :rank]
        rows = (sorted_f.sigma[..., :rank] / received.sigma / columns).mean(1)
        reply = AdapterState({LAYER: rescaled(kept, rows, columns)}, initial.tensors)
        updates.append(ClientUpdate(k, 1.0 + k, reply))
    after, _ = agg.aggregate(state, updates, 1)
    norms = np.array([u.weight * np.linalg.norm(product(*c)) for u, c in zip(updates, clients, strict=True)])
    share = norms / norms.sum()
    B, A, sigma, held = np.zeros((ROWS, 4)), np.zeros((4, COLUMNS)), np.zeros((fed.blocks, fed.blocks, 4)), np.zeros(4)
    for p, (B_k, sigma_k, A_k) in zip(share, clients, strict=True):
        r = A_k.shape[0]
        B[:, :r] += p * B_k
        A[:r] += p * A_k
        sigma[..., :r] += p * sigma_k
        held[:r] += p
    close(total(after), product(B, sigma / held, A))


@ALL_FLEETS
def test_fedex_folds_what_the_mean_factors_miss(fleet, fleets):
    _, _, after, _, weights, clients = play(fleets[fleet], "fedex")
    mean, factors = mean_of_products(weights, clients), product(*means(weights, clients))
    close(dense(after.current.layers[LAYER]), factors)
    close(dense(after.fold[LAYER]), mean - factors)


@ALL_FLEETS
def test_lora_fair_solves_the_ridge_problem(fleet, fleets):
    _, _, after, _, weights, clients = play(fleets[fleet], "lora-fair")
    _, _, plain, _, _, _ = play(fleets[fleet], "fedavg")
    B, sigma, A = parts(plain.current.layers[LAYER])
    mean, b = mean_of_products(weights, clients), sigma.shape[0]
    rows = ROWS // b
    wanted = np.zeros_like(B)
    for i in range(b):
        block = slice(i * rows, (i + 1) * rows)
        right = 2.0 * np.concatenate(
            [np.diag(sigma[i, j]) @ A[:, j * COLUMNS // b : (j + 1) * COLUMNS // b] for j in range(b)], axis=1
        )
        ridge = math.sqrt(0.01 * np.mean(np.sum(right**2, axis=1)))
        design = np.concatenate([right.T, ridge * np.eye(4)])
        goal = np.concatenate([mean[block].T, ridge * B[block].T])
        wanted[block] = np.linalg.lstsq(design, goal, rcond=None)[0].T
    close(after.current.layers[LAYER].B.numpy(), wanted)
    fair, average = total(after), total(plain)
    assert np.linalg.norm(fair - mean) < np.linalg.norm(average - mean)


@ALL_FLEETS
def test_fedsa_averages_a_and_leaves_the_rest(fleet, fleets):
    agg, state, after, report, weights, clients = play(fleets[fleet], "fedsa")
    assert agg.shares() == {"A", "tensors"}
    close(after.current.layers[LAYER].A.numpy(), means(weights, clients)[2])
    assert torch.equal(after.current.layers[LAYER].B, state.current.layers[LAYER].B)
    assert torch.equal(after.current.layers[LAYER].sigma, state.current.layers[LAYER].sigma)
    assert report["clients"] == 4


def test_fedrot_finds_rotated_copies_equal(fleets):
    """Rotated copies of one update average to that update; plain averaging does not."""
    fed = fleets["lora"]
    state = ServerState.start(fed.initial())
    trained = fed.train(state.current, frozenset({"A", "B"}), 3).layers[LAYER]
    updates = []
    for k in range(3):
        Q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(k), dtype=torch.float64)).Q
        rotated = BlockFactors(trained.B @ Q, trained.sigma, Q.T @ trained.A, 2.0)
        updates.append(ClientUpdate(k, 1.0, AdapterState({LAYER: rotated}, state.current.tensors)))
    wanted = trained.dense().numpy()
    after, _ = fed.built("fedrot").aggregate(state, updates, 1)
    plain, _ = fed.built("fedavg").aggregate(state, updates, 1)
    close(total(after), wanted)
    assert np.linalg.norm(total(plain) - wanted) > 0.1 * np.linalg.norm(wanted)


def test_fedrot_rotates_by_the_best_orthogonal_matrix(fleets):
    """The joint Procrustes solution: no rotation nearby, and none of many drawn, comes closer to the reference."""
    fed = fleets["lora"]
    reference = fed.initial(1).layers[LAYER]
    f = fed.train(fed.initial(2), frozenset({"A", "B"}), 3).layers[LAYER]
    aligned = align(f, reference)

    def distance(B, A):
        size_B = f.B.norm() * reference.B.norm()
        size_A = f.A.norm() * reference.A.norm()
        return float((B - reference.B).square().sum() / size_B + (A - reference.A).square().sum() / size_A)

    best = distance(aligned.B, aligned.A)
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        drawn = torch.randn(4, 4, generator=g, dtype=torch.float64)
        Q = torch.linalg.qr(drawn).Q if seed % 2 else torch.linalg.matrix_exp(0.05 * (drawn - drawn.T))
        assert distance(aligned.B @ Q, Q.T @ aligned.A) > best


@pytest.mark.parametrize("transform", ["exp_norm", "identity"])
def test_fedrot_undoes_permuted_and_signed_components_of_blocks(transform, fleets):
    fed = fleets[f"bora {transform}"]
    state = ServerState.start(fed.initial())
    f = fed.train(state.current, frozenset({"A", "B", "sigma"}), 3, size=0.1).layers[LAYER]
    updates = []
    for k, order in enumerate(([0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0])):
        sign = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64) * (-1) ** k
        turned = BlockFactors(f.B[:, order] * sign, f.sigma[..., order], f.A[order] * sign[:, None], 2.0)
        updates.append(ClientUpdate(k, 1.0, AdapterState({LAYER: turned}, state.current.tensors)))
    after, _ = fed.built("fedrot").aggregate(state, updates, 1)
    close(total(after), f.dense().numpy())


@ONE_BLOCK
@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
def test_florist_keeps_the_energy_it_is_asked_for(fleet, threshold, fleets):
    _, _, after, report, weights, clients = play(fleets[fleet], "florist", threshold=threshold)
    U, S, Vt = np.linalg.svd(mean_of_products(weights, clients))
    share = np.cumsum(S**2) / np.sum(S**2)
    rank = min(int(np.argmax(share >= threshold)) + 1, 4)
    assert report["rank"] == after.current.layers[LAYER].rank == rank
    close(total(after), (U[:, :rank] * S[:rank]) @ Vt[:rank])


def test_florist_comes_back_to_a_higher_rank(fleets):
    """The rank follows the updates in both directions, up to the adapter's."""
    fed = fleets["lora"]
    agg = fed.built("florist", threshold=0.3)
    state, updates = fed.round(agg)
    low, _ = agg.aggregate(state, updates, 1)
    assert low.current.layers[LAYER].rank < 4
    again = [ClientUpdate(k, 1.0, fed.train(low.current, agg.trains(2), 90 + k, size=4.0)) for k in range(4)]
    high, _ = fed.built("florist", threshold=1.0).aggregate(low, again, 2)
    assert high.current.layers[LAYER].rank == 4


@ONE_BLOCK
def test_refactor_of_one_block_is_the_truncated_svd(fleet, fleets):
    _, _, after, report, weights, clients = play(fleets[fleet], "refactor", sweeps=200)
    U, S, Vt = np.linalg.svd(mean_of_products(weights, clients))
    close(total(after), (U[:, :4] * S[:4]) @ Vt[:4], 1e-6)
    assert report["merge_error"] == pytest.approx(math.sqrt(np.sum(S[4:] ** 2) / np.sum(S**2)), rel=1e-6)


@ONE_BLOCK
@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 4, 4)])
def test_refactor_of_one_block_stays_where_the_clients_were_if_all_have_its_rank(fleet, ranks, fleets):
    """Of the rotations of the truncated SVD; smaller clients need the components that hold the most."""
    fed = fleets[fleet]
    agg = fed.built("refactor")
    start = fed.train(fed.initial(), frozenset({"B"}), 9)
    state = ServerState.start(start)
    updates = []
    for k, rank in enumerate(ranks):
        layers = {LAYER: at_rank(start.layers[LAYER], rank, fed.transform)}
        updates.append(
            ClientUpdate(k, 1.0, fed.train(AdapterState(layers, start.tensors), agg.trains(1), k, size=0.01))
        )
    after, _ = agg.aggregate(state, updates, 1)
    received, B, A = start.layers[LAYER].A.numpy(), *(parts(after.current.layers[LAYER])[part] for part in (0, 2))
    scales = np.linalg.svd(A, compute_uv=False)
    close(scales, np.full(4, scales[0]), 1e-6)  # orthogonal rows of one length: a rotation of the SVD's
    _, S, Vt = np.linalg.svd(dense(after.current.layers[LAYER]))
    likeness = np.sum(A * received) / np.linalg.norm(A) / np.linalg.norm(received)
    own = np.trace(Vt[:4] @ received.T) / 2 / np.linalg.norm(received)
    if ranks == (4, 4, 4):
        assert abs(own) < 0.5 < 0.9 < likeness
    else:
        close(np.linalg.norm(B, axis=0) / np.linalg.norm(B), S[:4] / np.linalg.norm(S[:4]), 1e-5)


@pytest.mark.parametrize("fleet", ["bora exp_norm", "bora identity"])
def test_refactor_is_never_worse_than_averaging(fleet, fleets):
    for power in range(6):
        fleets[fleet].drift = 0.05 * 2**power
        refactored, averaged = (play(fleets[fleet], name)[3]["merge_error"] for name in ("refactor", "fedavg"))
        assert refactored <= averaged * (1 + 1e-9)


@pytest.mark.parametrize("fleet", ["bora exp_norm", "bora identity"])
def test_refactor_recovers_a_mean_that_the_rank_can_hold(fleet, fleets):
    """Clients whose B differ but whose A and Sigma agree have a mean product of the adapter's rank."""
    fed = fleets[fleet]
    agg = fed.built("refactor")
    state = ServerState.start(fed.initial())
    updates = [ClientUpdate(k, 1.0 + k, fed.train(state.current, frozenset({"B"}), k)) for k in range(3)]
    after, report = agg.aggregate(state, updates, 1)
    weights = np.array([1.0, 2.0, 3.0]) / 6
    close(total(after), mean_of_products(weights, [parts(u.state.layers[LAYER]) for u in updates]), 1e-6)
    assert report["merge_error"] < 1e-6


@ALL_FLEETS
def test_a_carried_residual_is_added_to_the_next_merge(fleet, fleets):
    fed = fleets[fleet]
    agg, _state, after, report, weights, clients = play(fed, "refactor", residual="carry", residual_rank=64)
    mean = mean_of_products(weights, clients)
    carried = dense(after.carried[LAYER])
    close(total(after) + carried, mean)
    assert not after.fold
    assert report["carried_norm"] == pytest.approx(np.linalg.norm(carried), rel=1e-6)
    again = [ClientUpdate(0, 1.0, after.current)]
    later, _ = agg.aggregate(after, again, 2)
    left = dense(later.carried[LAYER]) if later.carried else 0.0
    close(total(later) + left, mean)


@ALL_FLEETS
def test_a_folded_residual_completes_the_merge(fleet, fleets):
    _, _, after, report, weights, clients = play(fleets[fleet], "refactor", residual="fold", residual_rank=64)
    mean = mean_of_products(weights, clients)
    close(total(after), mean)
    assert not after.carried
    assert after.fold_version == 1
    assert report["merge_error"] < 1e-6
    _, _, small, _, _, _ = play(fleets[fleet], "refactor", residual="fold", residual_rank=2)
    _, _, dropped, _, _, _ = play(fleets[fleet], "refactor", residual="drop")
    assert small.fold[LAYER].rank == 2
    assert not dropped.fold
    assert np.linalg.norm(total(small) - mean) < np.linalg.norm(total(dropped) - mean)


@ALL_FLEETS
@pytest.mark.parametrize(("step", "momentum"), [(0.5, 0.0), (1.0, 0.6), (0.7, 0.9), (2.5, 0.3)])
def test_steps_of_the_product_follow_nesterov(fleet, step, momentum, fleets):
    """Three rounds; what the rank cannot hold is carried, so that the recursion is that of dense matrices."""
    fed = fleets[fleet]
    agg = fed.built(
        "refactor", product_step=step, product_momentum=momentum, residual="carry", residual_rank=64, sweeps=200
    )
    state = ServerState.start(fed.initial())
    velocity = np.zeros_like(dense(state.current.layers[LAYER]))
    for round in (1, 2, 3):
        trained = [fed.train(state.current, agg.trains(round), 10 * round + k) for k in range(3)]
        updates = [ClientUpdate(k, 1.0 + k, s) for k, s in enumerate(trained)]
        mean = mean_of_products(np.array([1.0, 2.0, 3.0]) / 6, [parts(s.layers[LAYER]) for s in trained])
        before = dense(state.current.layers[LAYER])
        velocity = momentum * velocity + mean - before
        stands = before + (dense(state.carried[LAYER]) if state.carried else 0.0)
        wanted = stands + step * (mean - before + momentum * velocity)
        state, _ = agg.aggregate(ServerState.from_tensors(state.to_tensors(), 0), updates, round)
        close(total(state) + (dense(state.carried[LAYER]) if state.carried else 0.0), wanted, 1e-6)
    assert bool(state.velocity) == (momentum > 0)


@ALL_FLEETS
@pytest.mark.parametrize("options", [{"product_step": 1.5}, {"product_step": 0.5}, {"product_momentum": 0.5}])
def test_what_is_carried_stays_where_clients_move_nothing(fleet, options, fleets):
    fed = fleets[fleet]
    agg = fed.built("refactor", residual="carry", residual_rank=64, sweeps=200, **options)
    state, updates = fed.round(agg, clients=3)
    state, _ = agg.aggregate(state, updates, 1)
    norms = []
    for round in range(2, 12):
        state, report = agg.aggregate(state, [ClientUpdate(0, 1.0, state.current)], round)
        norms.append(report["carried_norm"])
    assert norms[-1] == pytest.approx(norms[-2], rel=0.02)  # of the momentum is .5 ** 10 left
    assert norms[-1] < 3 * norms[0]


@ALL_FLEETS
@pytest.mark.parametrize("name", ["flexlora", "florist", "refactor"])
def test_a_step_of_the_product_is_taken_by_every_strategy_that_fits_one(name, fleet, fleets):
    fed = fleets[fleet]
    options = {"threshold": 1.0} if name == "florist" else {}
    agg = fed.built(name, product_step=0.5, residual="carry", residual_rank=64, **options)
    state, updates = fed.round(agg, clients=3)
    _, report = agg.aggregate(state, updates, 1)
    assert report["merge_error"] < 1e-5
    beyond, _ = fed.built(name, **options).aggregate(state, updates, 1)
    weights = np.array([u.weight for u in updates]) / sum(u.weight for u in updates)
    mean = mean_of_products(weights, [parts(u.state.layers[LAYER]) for u in updates])
    halfway = (mean + dense(state.current.layers[LAYER])) / 2
    assert report["carried_norm"] < 0.98 * np.linalg.norm(total(beyond) - halfway)


def test_the_products_velocity_is_kept_at_the_rank_budget(fleets):
    _, _, after, _, _, _ = play(fleets["bora exp_norm"], "refactor", product_momentum=0.5, residual_rank=3)
    assert after.velocity[LAYER].rank == 3
    with pytest.raises(ConfigError, match=r"strategy\.product-step = 0\.5.*strategy\.name = 'fedavg'"):
        fleets["lora"].built("fedavg", product_step=0.5)


def test_cellm_averages_what_arrives(fleets):
    fed = fleets["lora"]
    agg, _, _, _, weights, clients = play(fed, "cellm")
    state, updates = fed.round(agg)
    sparse = [ClientUpdate(u.client, u.weight, sparsify(u.state, state.current, 0.25)) for u in updates]
    after, _ = agg.aggregate(state, sparse, 1)
    sent = parts(state.current.layers[LAYER])
    wanted = []
    for part in range(3):
        mean = np.zeros_like(sent[part])
        for w, client in zip(weights, clients, strict=True):
            change = client[part] - sent[part]
            count = math.ceil(0.25 * change.size)
            cut = np.sort(np.abs(change), axis=None)[-count]
            mean += w * np.where((np.abs(change) >= cut) & (change != 0), client[part], sent[part])
        wanted.append(mean)
    close(total(after), product(*wanted))
