"""Robust PCA against a planted problem and an independent solver, and the merge against its formula in NumPy."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bora_fl.strategies.robust_pca import split


def planted(d: int = 100, K: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    low = torch.randn(d, 1, generator=g, dtype=torch.float64) @ torch.randn(1, K, generator=g, dtype=torch.float64)
    sparse = torch.zeros(d, K, dtype=torch.float64)
    places = torch.rand(d, K, generator=g) < 0.03
    sparse[places] = 5 * torch.randn(int(places.sum()), generator=g, dtype=torch.float64).sign()
    return low, sparse


def test_a_planted_split_is_recovered():
    low, sparse = planted()
    found, rest = split(low + sparse)
    assert float((found - low).norm() / low.norm()) < 1e-4
    assert float((rest - sparse).norm() / sparse.norm()) < 1e-4


def admm(M: np.ndarray, steps: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """The same problem with a fixed penalty, which converges to its optimum."""
    weight, penalty = 1 / np.sqrt(max(M.shape)), M.size / (4 * np.abs(M).sum())
    S = Y = np.zeros_like(M)
    for _ in range(steps):
        U, s, Vt = np.linalg.svd(M - S + Y / penalty, full_matrices=False)
        L = (U * np.maximum(s - 1 / penalty, 0)) @ Vt
        T = M - L + Y / penalty
        S = np.sign(T) * np.maximum(np.abs(T) - weight / penalty, 0)
        Y = Y + penalty * (M - L - S)
    return M - S, S


@pytest.mark.parametrize("shape", [(30, 4), (7, 7), (40, 1), (3, 9)])
def test_the_split_is_the_optimum_of_another_solver(shape):
    M = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def objective(L, S):
        return np.linalg.norm(L, "nuc") + np.abs(S).sum() / np.sqrt(max(shape))

    L, S = (part.numpy() for part in split(M))
    np.testing.assert_allclose(L + S, M.numpy(), rtol=0, atol=1e-14)
    best = objective(*admm(M.numpy()))
    assert objective(L, S) == pytest.approx(best, rel=1e-4)


def test_the_split_scales_with_its_matrix():
    M = torch.randn(30, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(split(1e-3 * M)[1], 1e-3 * split(M)[1], rtol=1e-4, atol=1e-7)
    L, S = split(torch.zeros(4, 3, dtype=torch.float64))
    assert not L.any()
    assert not S.any()


@pytest.mark.parametrize("scale", [1.0, 0.0, 3.0])
def test_the_merge_is_the_mean_plus_the_scaled_sparse_part(scale, fleets):
    fed = fleets["lora"]
    agg = fed.built("fedrpca", sparse_scale=scale)
    state, updates = fed.round(agg)
    after, _ = agg.aggregate(state, updates, 1)
    weights = np.array([u.weight for u in updates]) / sum(u.weight for u in updates)
    for part in ("B", "A"):
        tensors = [getattr(u.state.layers["query"], part).numpy() for u in updates]
        mean = sum(w * t for w, t in zip(weights, tensors, strict=True))
        sent = getattr(state.current.layers["query"], part).numpy()
        D = np.stack([w * (t - sent).ravel() for w, t in zip(weights, tensors, strict=True)], axis=1)
        _, S = admm(D)
        wanted = mean + (scale - 1) * S.sum(1).reshape(mean.shape)
        found = getattr(after.current.layers["query"], part).numpy()
        assert np.linalg.norm(found - wanted) <= 1e-2 * np.linalg.norm(wanted - mean) + 1e-12
    plain, _ = fed.built("fedavg").aggregate(state, updates, 1)
    assert torch.equal(after.current.layers["query"].sigma, plain.current.layers["query"].sigma)


def test_what_one_client_says_loudly_counts_more(fleets):
    """An entry that a single client moves far is moved β times as far by the merge; what all move is averaged."""
    fed = fleets["lora"]
    agg = fed.built("fedrpca", sparse_scale=2.0)
    state, updates = fed.round(agg, weights=[1.0] * 4)
    fed.drift = 0.0
    _, updates = fed.round(agg, weights=[1.0] * 4)
    updates[1].state.layers["query"].B[3, 2] += 8.0
    after, _ = agg.aggregate(state, updates, 1)
    moved = after.current.layers["query"].B - state.current.layers["query"].B
    assert float(moved[3, 2]) == pytest.approx(2 * 8 / 4, rel=0.1)
    moved[3, 2] = 0
    assert float(moved.abs().max()) < 1e-6


def test_clients_that_agree_are_averaged(fleets):
    fed = fleets["bora exp_norm"]
    agg = fed.built("fedrpca", sparse_scale=5.0)
    state, (only,) = fed.round(agg, clients=1)
    twins = [replace(only, client=k, weight=w) for k, w in enumerate((1.0, 5.0, 2.5))]
    for updates in ([only], twins):
        after, _ = agg.aggregate(state, updates, 1)
        torch.testing.assert_close(after.current.layers["query"].dense(), only.state.layers["query"].dense())
