"""Refactorization: laws, recovery of planted problems, and dense float64 oracles."""

from __future__ import annotations

import itertools

import pytest
import torch

from bora_fl.blocks import BlockFactors, distance, factor_mean, fix_gauge, merge, refactorize, relative_error
from bora_fl.blocks.planted import F64, drifting_clients, from_dense, planted, random_factors
from bora_fl.simulations.benchmarks.merging import LargestTensor


def error_by_definition(fit: BlockFactors, target: torch.Tensor) -> float:
    return float((fit.dense().double() - target).norm() / target.norm())


def mean_of(clients: list[BlockFactors]) -> tuple[BlockFactors, BlockFactors]:
    weights = [1 / len(clients)] * len(clients)
    return merge(clients, weights), factor_mean(clients, weights)


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("transform", ["identity", "exp_norm"])
def test_one_block_is_the_truncated_svd(rank: int, transform: str) -> None:
    clients = [random_factors(k, b=1, r=4, positive=True) for k in range(3)]
    merged, _ = mean_of(clients)
    u, s, vh = torch.linalg.svd(merged.dense(), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    fit = refactorize(merged, rank, sigma_transform=transform)
    torch.testing.assert_close(fit.factors.dense(), best, rtol=1e-8, atol=1e-10)
    if transform == "identity":
        torch.testing.assert_close(fit.factors.sigma, torch.ones(1, 1, rank, dtype=F64))


@pytest.mark.parametrize("transform", ["identity", "exp_norm"])
@pytest.mark.parametrize("b", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_error_is_the_dense_one_and_never_above_the_start(transform: str, b: int, dtype: torch.dtype) -> None:
    clients = [f.to(dtype) for f in drifting_clients(b, 5, b=b)]
    merged, mean = mean_of(clients)
    fit = refactorize(merged, 4, start=mean, sigma_transform=transform)
    dense = merged.dense().double()
    assert fit.factors.B.dtype == fit.factors.A.dtype == fit.factors.sigma.dtype == dtype
    assert fit.relative_error == pytest.approx(error_by_definition(fit.factors, dense), rel=1e-4)
    assert fit.start_error == pytest.approx(error_by_definition(mean, dense), rel=1e-4)
    assert fit.start_error is not None
    assert fit.relative_error < fit.start_error
    assert all(later <= earlier for earlier, later in itertools.pairwise(fit.history))


@pytest.mark.parametrize("transform", ["identity", "exp_norm"])
def test_b_alone_is_the_dense_least_squares_solution_and_leaves_the_rest(transform: str) -> None:
    merged, mean = mean_of(drifting_clients(5, 5, b=4))
    mean = fix_gauge(mean, sigma_transform=transform)
    fit = refactorize(merged, 4, start=mean, sigma_transform=transform, only_B=True)
    b, p, q = 4, merged.shape[0] // 4, merged.shape[1] // 4
    right = [
        torch.cat([mean.sigma[i, j][:, None] * mean.A[:, j * q : j * q + q] for j in range(b)], 1) for i in range(b)
    ]
    dense = merged.dense() / mean.scaling
    for i in range(b):
        best = torch.linalg.lstsq(right[i].mT, dense[i * p : (i + 1) * p].mT).solution.mT
        wanted = best @ right[i] * mean.scaling
        torch.testing.assert_close(fit.factors.dense()[i * p : (i + 1) * p], wanted, rtol=1e-6, atol=1e-8)
    assert fit.start_error is not None
    assert fit.relative_error < fit.start_error
    with pytest.raises(ValueError, match="give a start"):
        refactorize(merged, 4, only_B=True)


@pytest.mark.parametrize("b", [2, 4])
def test_a_finished_fit_is_a_stationary_point_of_the_dense_objective(b: int) -> None:
    merged, mean = mean_of(drifting_clients(b, 4, b=b))
    fit = refactorize(merged, 4, start=mean, sweeps=400, tolerance=1e-9).factors
    parts = [t.clone().requires_grad_() for t in (fit.B, fit.sigma, fit.A)]
    loss = (BlockFactors(*parts, fit.scaling).dense() - merged.dense()).square().sum()
    start = [t.clone().requires_grad_() for t in (mean.B, mean.sigma, mean.A)]
    loss_at_mean = (BlockFactors(*start, mean.scaling).dense() - merged.dense()).square().sum()
    for here, there in zip(torch.autograd.grad(loss, parts), torch.autograd.grad(loss_at_mean, start), strict=True):
        assert float(here.norm()) < 1e-3 * float(there.norm())


@pytest.mark.parametrize(("b", "r"), [(2, 4), (2, 16), (4, 8), (8, 4), (16, 4)])
def test_a_cold_start_recovers_planted_factors(b: int, r: int) -> None:
    for seed in range(2):
        truth = planted(seed, b, r, side=2 * r)
        fit = refactorize(from_dense(truth.dense(), b), r)
        assert error_by_definition(fit.factors, truth.dense()) < 1e-6


@pytest.mark.parametrize(("b", "r", "seed"), [(2, 8, 0), (4, 4, 1), (8, 4, 2)])
def test_a_cold_start_finds_planted_factors_under_noise(b: int, r: int, seed: int) -> None:
    truth = planted(seed, b, r, side=2 * r).dense()
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    noisy = truth + 0.01 * noise * truth.norm() / noise.norm()
    fit = refactorize(from_dense(noisy, b), r, cold=3)
    assert fit.relative_error < 1.05 * float((noisy - truth).norm() / noisy.norm())


def test_the_better_of_warm_and_cold_is_kept() -> None:
    truth = planted(0, 4, 4, side=8)
    bad = random_factors(1, 32, 32, b=4, r=4, scaling=1.0)
    merged = from_dense(truth.dense(), 4)
    warm = refactorize(merged, 4, start=bad)
    both = refactorize(merged, 4, start=bad, cold=1)
    assert both.origin == "cold"
    assert both.relative_error < 1e-6 < warm.relative_error
    good = refactorize(merged, 4, start=truth, cold=1)
    assert good.relative_error < 1e-9


@pytest.mark.parametrize("transform", ["identity", "exp_norm"])
@pytest.mark.parametrize("clients", [1, 5])
def test_identical_clients_come_back_as_they_were(transform: str, clients: int) -> None:
    client = drifting_clients(3, 1)[0]
    merged, mean = mean_of([client] * clients)
    fit = refactorize(merged, client.rank, start=mean, sigma_transform=transform)
    order = torch.argsort(client.component_energy(), descending=True)
    assert distance(fit.factors, client) < 1e-10 * client.norm()
    # Not only the product: up to order and sign, every factor is the client's own.
    torch.testing.assert_close(fit.factors.A.abs(), client.A[order].abs(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fit.factors.B.abs(), client.B[:, order].abs(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fit.factors.sigma, client.sigma[..., order], rtol=1e-5, atol=1e-6)


def test_order_of_clients_scale_of_weights_and_a_tiny_client_do_not_matter() -> None:
    clients = drifting_clients(4, 4)
    weights = [0.1, 0.2, 0.3, 0.4]
    reference = refactorize(merge(clients, weights), 4, start=factor_mean(clients, weights)).factors
    backward = refactorize(merge(clients[::-1], weights[::-1]), 4, start=factor_mean(clients[::-1], weights[::-1]))
    assert relative_error(backward.factors, reference) < 1e-9
    doubled = refactorize(merge(clients, [2 * w for w in weights]), 4, start=factor_mean(clients, weights)).factors
    halved = BlockFactors(doubled.B, doubled.sigma / 2, doubled.A, doubled.scaling)
    assert relative_error(halved, reference) < 1e-6
    stranger = random_factors(99, 48, 64, b=4, r=4)
    more, more_weights = [*clients, stranger], [*weights, 1e-9]
    tiny = refactorize(merge(more, more_weights), 4, start=factor_mean(more, more_weights)).factors
    assert relative_error(tiny, reference) < 1e-6


@pytest.mark.parametrize("transform", ["identity", "exp_norm"])
def test_an_update_of_zero_leaves_a_and_sigma_to_be_trained(transform: str) -> None:
    clients = [BlockFactors(torch.zeros_like(f.B), f.sigma, f.A, f.scaling) for f in drifting_clients(5, 3)]
    merged, mean = mean_of(clients)
    fit = refactorize(merged, 4, start=mean, sigma_transform=transform)
    assert fit.relative_error == 0
    assert float(fit.factors.B.abs().max()) == 0
    torch.testing.assert_close(fit.factors.A, mean.A)
    torch.testing.assert_close(fit.factors.sigma, mean.sigma)
    assert float(refactorize(merged, 4).factors.A.norm(dim=1).min()) > 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_exp_norm_fits_stay_in_its_range_whatever_the_target(seed: int) -> None:
    # Sigma of mixed signs and over many orders: far outside what exp_norm can reach.
    wide = random_factors(seed + 10, r=4)
    sigma = 10 ** (8 * torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=F64) - 4)
    merged = merge([random_factors(seed, r=4), BlockFactors(wide.B, sigma, wide.A, 1.0)], [1.0, 0.01])
    fit = refactorize(merged, 4, sigma_transform="exp_norm")
    sigma = fit.factors.sigma
    assert bool((sigma > 0).all())
    assert float(sigma.log().abs().mean()) == pytest.approx(1.0, abs=1e-9)
    assert fit.relative_error == pytest.approx(error_by_definition(fit.factors, merged.dense()), rel=1e-6)
    free = refactorize(merged, 4)
    assert free.relative_error < fit.relative_error < 1


@pytest.mark.parametrize("transform", ["identity", "exp_norm"])
def test_nothing_larger_than_the_stacked_factors_is_allocated(transform: str) -> None:
    clients = [f.to(torch.float32) for f in drifting_clients(7, 10, 1024, 1024, b=8, r=4)]
    with LargestTensor() as largest:
        merged, mean = mean_of(clients)
        refactorize(merged, 4, start=mean, sigma_transform=transform)
    assert largest.elements <= (1024 + 1024) * 40


def test_rank_larger_than_the_stack_is_exact() -> None:
    f = random_factors(7)
    fit = refactorize(f, 6)
    assert fit.factors.rank == 6
    assert fit.origin == "exact"
    assert distance(fit.factors, f) < 1e-12 * f.norm()


def test_bad_arguments_are_refused() -> None:
    f = random_factors(8)
    with pytest.raises(ValueError, match="rank is 0"):
        refactorize(f, 0)
    with pytest.raises(ValueError, match="start is of"):
        refactorize(f, 2, start=f)
    with pytest.raises(ValueError, match="sigma_transform is 'exp'"):
        refactorize(f, 2, sigma_transform="exp")
