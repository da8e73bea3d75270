"""The Gram-weighted merge against dense computations in NumPy float64, and its optimality."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bora_fl.blocks import BlockFactors, factor_mean, refactorize
from bora_fl.blocks.gram import bounded, gram_of, merge_in_norm, packed, refactorize_in_norm, shrunk, unpacked
from bora_fl.config import PrivacySettings, Settings, StrategySettings
from bora_fl.strategies.aggregation import build

KINDS = pytest.mark.parametrize("kind", ["blocks", "diagonal"])
FLEETS = pytest.mark.parametrize("fleet", ["bora exp_norm", "bora identity", "one block", "lora"])


def whole(gram: torch.Tensor) -> np.ndarray:
    """The Gram matrix [n, n] that a merge uses: off-diagonals times .9, a trace of a ridge."""
    G = torch.diag(gram.flatten()) if gram.dim() == 2 else torch.block_diag(*gram)
    G = 0.9 * G.numpy() + 0.1 * np.diag(np.diag(G.numpy()))
    return G + 1e-6 * np.diag(G).mean() * np.eye(len(G))


def root(G: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(G)
    return (vectors * np.sqrt(values)) @ vectors.T


def dense_merge(updates) -> tuple[np.ndarray, np.ndarray]:
    """`(Σ w_k M_k G_k) Ḡ⁻¹` and Ḡ, by their definition."""
    weights = np.array([u.weight for u in updates]) / sum(u.weight for u in updates)
    grams = [whole(u.grams["query"]) for u in updates]
    products = [u.state.layers["query"].dense().numpy() for u in updates]
    mean = sum(w * G for w, G in zip(weights, grams, strict=True))
    moved = sum(w * M @ G for w, M, G in zip(weights, products, grams, strict=True))
    return moved @ np.linalg.inv(mean), mean


def close(found, wanted, tolerance=1e-9):
    assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted)


@KINDS
@FLEETS
def test_the_stack_is_the_minimizer_of_the_clients_output_errors(fleet, kind, fleets):
    fed = fleets[fleet]
    _, updates = fed.round(fed.built("regmean", gram=kind))
    M, mean = dense_merge(updates)
    weights = [u.weight / sum(u.weight for u in updates) for u in updates]
    factors, grams = [u.state.layers["query"] for u in updates], [u.grams["query"] for u in updates]
    stack, gram = merge_in_norm(factors, weights, grams)
    close(stack.dense().numpy(), M)
    close((torch.diag(gram.flatten()) if gram.dim() == 2 else torch.block_diag(*gram)).numpy(), mean)

    def error(update):
        products = [f.dense().numpy() for f in factors]
        return sum(
            w * np.trace((update - P) @ whole(G) @ (update - P).T)
            for w, P, G in zip(weights, products, grams, strict=True)
        )

    best, rng = error(M), np.random.default_rng(0)
    for _ in range(20):
        assert error(M + 0.01 * rng.standard_normal(M.shape)) > best


@KINDS
@pytest.mark.parametrize("fleet", ["one block", "one block identity", "lora"])
def test_one_block_is_the_truncated_svd_in_the_inputs_norm(fleet, kind, fleets):
    fed = fleets[fleet]
    agg = fed.built("regmean", gram=kind)
    state, updates = fed.round(agg)
    M, G = dense_merge(updates)
    R = root(G)
    U, S, Vt = np.linalg.svd(M @ R)
    after, _ = agg.aggregate(state, updates, 1)
    close(after.current.layers["query"].dense().numpy(), (U[:, :4] * S[:4]) @ Vt[:4] @ np.linalg.inv(R), 1e-7)


@KINDS
@pytest.mark.parametrize("fleet", ["bora exp_norm", "bora identity"])
def test_more_blocks_solve_for_b_in_the_inputs_norm(fleet, kind, fleets):
    fed = fleets[fleet]
    agg = fed.built("regmean", gram=kind)
    state, updates = fed.round(agg)
    M, G = dense_merge(updates)
    R = root(G)
    total = sum(u.weight for u in updates)
    mean = factor_mean([u.state.layers["query"] for u in updates], [u.weight / total for u in updates])
    b, sigma, A = mean.num_blocks, mean.sigma.numpy(), mean.A.numpy()
    rows, columns = M.shape[0] // b, M.shape[1] // b
    wanted = np.zeros_like(M)
    for i in range(b):
        right = np.concatenate([sigma[i, j][:, None] * A[:, j * columns : (j + 1) * columns] for j in range(b)], axis=1)
        block = M[i * rows : (i + 1) * rows]
        B = np.linalg.lstsq((right @ R).T, (block @ R).T, rcond=None)[0].T
        wanted[i * rows : (i + 1) * rows] = B @ right
    after, _ = agg.aggregate(state, updates, 1)
    close(after.current.layers["query"].dense().numpy(), wanted, 1e-7)


@pytest.mark.parametrize("fleet", ["bora exp_norm", "bora identity"])
def test_the_fit_is_never_worse_than_the_factor_mean_in_its_norm(fleet, fleets):
    fed = fleets[fleet]
    for refit in ("B", "all"):
        agg = fed.built("regmean", refit=refit)
        state, updates = fed.round(agg)
        M, G = dense_merge(updates)
        total = sum(u.weight for u in updates)
        mean = factor_mean([u.state.layers["query"] for u in updates], [u.weight / total for u in updates])

        fit = agg.aggregate(state, updates, 1)[0].current.layers["query"]
        errors = [np.linalg.norm((f.dense().numpy() - M) @ root(G)) for f in (fit, mean)]
        assert errors[0] <= errors[1]


@KINDS
@FLEETS
def test_white_inputs_give_refactor(fleet, kind, fleets):
    fed = fleets[fleet]
    state, updates = fed.round(fed.built("refactor"))
    n = updates[0].state.layers["query"].shape[1]
    white = gram_of(torch.eye(n, dtype=torch.float64), fed.blocks, kind)
    same = [replace(u, grams={"query": 3.0 * white}) for u in updates]
    found, _ = fed.built("regmean", gram=kind).aggregate(state, same, 1)
    wanted, _ = fed.built("refactor").aggregate(state, updates, 1)
    close(found.current.layers["query"].dense().numpy(), wanted.current.layers["query"].dense().numpy(), 1e-6)


def test_updates_without_gram_matrices_are_refactorized(fleets):
    fed = fleets["bora exp_norm"]
    agg = fed.built("regmean")
    state, updates = fed.round(agg)
    bare = [replace(u, grams={}) for u in updates]
    wanted, _ = fed.built("refactor").aggregate(state, bare, 1)
    for some in (bare, [updates[0], *bare[1:]]):
        found, _ = agg.aggregate(state, some, 1)
        assert torch.equal(found.current.layers["query"].B, wanted.current.layers["query"].B)


@KINDS
def test_no_client_takes_the_merge_over_by_the_size_of_its_gram_matrix(kind, fleets):
    fed = fleets["bora exp_norm"]
    agg = fed.built("regmean", gram=kind)
    state, updates = fed.round(agg)
    honest = [u.grams["query"] for u in updates]
    assert all(torch.equal(a, b) for a, b in zip(bounded(honest), honest, strict=True))

    def merged(size: float, block: int | None = None) -> np.ndarray:
        gram = honest[0].clone()
        gram[block if block is not None else slice(None)] *= size
        lying = [replace(updates[0], grams={"query": gram}), *updates[1:]]
        found, _ = agg.aggregate(state, lying, 1)
        return found.current.layers["query"].dense().numpy()

    close(merged(1e3), merged(1e9), 1e-6)
    close(merged(1e3, block=1), merged(1e9, block=1), 1e-6)
    plain, liar = merged(1.0), updates[0].state.layers["query"].dense().numpy()
    assert np.linalg.norm(merged(1e9) - liar) > 0.25 * np.linalg.norm(plain - liar)


def spread(seed: int, kind="blocks") -> torch.Tensor:
    """Two blocks of inputs that are spread over many directions."""
    g = torch.Generator().manual_seed(seed)
    return gram_of(torch.randn(400, 40, generator=g, dtype=torch.float64), 2, kind) / 400


@KINDS
def test_no_client_takes_a_direction_over_by_a_trace_that_is_all_in_it(kind):
    """Of the size that all have: in that direction it weighs four others, in the place of twenty."""
    honest = [spread(seed, kind) for seed in range(1, 5)]
    lie = torch.zeros_like(honest[0])
    if kind == "blocks":
        top = torch.linalg.eigh(torch.stack(honest).mean(0))[1][..., -1]
        lie += honest[0].diagonal(dim1=1, dim2=2).sum(1)[:, None, None] * torch.einsum("bp,bq->bpq", top, top)
        lie = unpacked(packed(lie), 2, 40, kind)
    else:
        lie[:, 0] = honest[0].sum(1)
    found = bounded([lie, *honest])
    assert all(torch.equal(a, b) for a, b in zip(found[1:], honest, strict=True))
    for block in range(2):
        if kind == "blocks":
            sizes = sorted(float(torch.linalg.eigvalsh(gram[block])[-1]) for gram in [lie, *honest])
            largest = float(torch.linalg.eigvalsh(found[0][block])[-1])
        else:
            sizes, largest = sorted(float(gram[block].max()) for gram in [lie, *honest]), float(found[0][block].max())
        assert 3.9 * sizes[2] < largest < 4.001 * sizes[2] < sizes[-1]


def test_what_is_cut_keeps_its_other_directions():
    honest = [spread(seed) for seed in range(3)]
    lie = honest[0].clone()
    vectors = torch.linalg.eigh(lie[1])[1]
    lie[1] += 20 * torch.outer(vectors[:, 0], vectors[:, 0])
    found = bounded([lie, *honest])[0]
    torch.testing.assert_close(found[0], lie[0])
    before, after = torch.linalg.eigvalsh(lie[1]), torch.linalg.eigvalsh(found[1])
    torch.testing.assert_close(after[:-1], before[:-1])
    assert after[-1] < 0.5 * before[-1]


def test_inputs_of_few_directions_do_not_break_the_solve(fleets):
    """A rank-one and an all-zero Gram matrix: a layer that always sees the same, or nothing."""
    fed = fleets["one block"]
    agg = fed.built("regmean")
    state, updates = fed.round(agg)
    for x in (torch.zeros(1, 16), torch.ones(1, 16), torch.eye(16)[:1]):
        flat = [replace(u, grams={"query": gram_of(x, 1, "blocks")}) for u in updates]
        after, report = agg.aggregate(state, flat, 1)
        assert all(
            bool(torch.isfinite(t).all()) for t in (after.current.layers["query"].B, after.current.layers["query"].A)
        )
        assert np.isfinite(report["merge_error"])


@KINDS
@pytest.mark.parametrize("blocks", [1, 2, 6])
def test_a_gram_matrix_is_packed_and_unpacked(blocks, kind):
    x = torch.randn(7, 12, dtype=torch.float64)
    gram = gram_of(x, blocks, kind)
    full = x.T @ x
    for j in range(blocks):
        part = full[j * 12 // blocks : (j + 1) * 12 // blocks, j * 12 // blocks : (j + 1) * 12 // blocks]
        torch.testing.assert_close(gram[j], part if kind == "blocks" else part.diagonal())
    assert torch.equal(unpacked(packed(gram), blocks, 12, kind), gram)
    assert packed(gram).numel() == (12 if kind == "diagonal" else 12 * (12 // blocks + 1) // 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p[:, :-1], "shape"),
        (lambda p: p * float("nan"), "not finite"),
        (lambda p: -p, "negative diagonal"),
        (lambda p: p + 1e6 * torch.tensor([0.0, 1, 0]), "beyond what its diagonal allows"),
    ],
)
def test_what_is_no_gram_matrix_is_refused(change, words):
    good = packed(gram_of(torch.randn(7, 4, dtype=torch.float64), 2, "blocks"))
    with pytest.raises(ValueError, match=words):
        unpacked(change(good), 2, 4, "blocks")


def test_a_fit_in_the_norm_of_the_identity_is_a_plain_fit():
    g = torch.Generator().manual_seed(0)
    stack, start = (
        BlockFactors(*(torch.rand(s, generator=g, dtype=torch.float64) for s in ((12, r), (2, 2, r), (r, 8))))
        for r in (7, 3)
    )
    eye = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    options = {"start": start, "sigma_transform": "identity", "only_B": False, "sweeps": 5}
    found = refactorize_in_norm(stack, 3, eye, **options)
    wanted = refactorize(stack, 3, **options).factors
    for part in ("B", "sigma", "A"):
        torch.testing.assert_close(getattr(found, part), getattr(wanted, part))
    assert float(shrunk(eye).diagonal(dim1=1, dim2=2).max()) == pytest.approx(1 + 1e-6)


@pytest.mark.parametrize("mode", ["record", "client", "local"])
def test_no_privacy_mode_takes_gram_matrices(mode):
    settings = Settings(
        strategy=StrategySettings(name="regmean", weighting="uniform"), privacy=PrivacySettings(mode=mode)
    )
    with pytest.raises(ValueError, match=rf"privacy.mode = '{mode}'.*Gram matrices.*use refactor"):
        build(settings)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int64])
def test_a_gram_matrix_of_another_dtype_is_refused(dtype: torch.dtype):
    with pytest.raises(ValueError, match="expected torch"):
        unpacked(torch.ones(2, 3).to(dtype), 2, 6, "diagonal")


def test_a_gram_matrix_of_no_inputs_is_refused():
    """Each pair of its inputs could be, all three together not; the mean with others' would have no Cholesky factor."""
    lie = torch.eye(3).double()
    lie[0, 1] = lie[1, 0] = lie[0, 2] = lie[2, 0] = 1.0
    lie[1, 2] = lie[2, 1] = -1.0
    with pytest.raises(ValueError, match="negative side"):
        unpacked(packed(lie[None]), 1, 3, "blocks")
    one = torch.tensor([1.0, -2.0, 0.5])
    for inputs in (one[None], torch.zeros(4, 3)):  # of one example, and of a layer that sees nothing
        unpacked(packed(gram_of(inputs, 1, "blocks")).float(), 1, 3, "blocks")
