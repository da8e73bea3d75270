"""Residuals within a rank budget, against dense float64."""

from __future__ import annotations

import pytest
import torch

from bora_fl.blocks import (
    StreamingMerge,
    factor_mean,
    merge,
    refactorize,
    residual,
)
from bora_fl.blocks.least_squares import Fit
from bora_fl.blocks.planted import F64, drifting_clients, random_factors
from bora_fl.blocks.svd import leading_svd
from bora_fl.blocks.targets import StackTarget


def tail(matrix: torch.Tensor, rank: int) -> float:
    """What the truncated SVD leaves."""
    return float(torch.linalg.svdvals(matrix)[rank:].norm())


@pytest.mark.parametrize("budget", [1, 4, 8])
@pytest.mark.parametrize("kind", ["stack", "cores"])
@pytest.mark.parametrize("b", [1, 4])
def test_a_residual_is_the_svd_for_one_block_and_better_than_it_for_more(budget: int, kind: str, b: int) -> None:
    clients, weights = drifting_clients(0, 5, b=b), [0.2] * 5
    merged = merge(clients, weights)
    fit = refactorize(merged, 4, start=factor_mean(clients, weights)).factors
    rest = merged.dense() - fit.dense()
    update = merged
    if kind == "cores":
        stream = StreamingMerge(16)
        for f, w in zip(clients, weights, strict=True):
            stream.add(f, w)
        update = stream.result()  # type: ignore[assignment]
    found = residual(update, fit, budget)
    assert (found.num_blocks, found.rank) == (b, budget)
    left = float((rest - found.dense()).norm())
    assert left == pytest.approx(tail(rest, budget), rel=1e-9) if b == 1 else left < tail(rest, budget)


def test_enough_budget_leaves_nothing_and_a_perfect_fit_leaves_zero() -> None:
    clients, weights = drifting_clients(1, 2), [0.5, 0.5]
    merged = merge(clients, weights)
    fit = refactorize(merged, 4, start=factor_mean(clients, weights)).factors
    whole = residual(merged, fit, 12)
    assert float((merged.dense() - fit.dense() - whole.dense()).norm()) < 1e-13 * merged.norm()
    assert residual(clients[0], clients[0], 2).norm() < 1e-12 * clients[0].norm()


def test_a_budget_above_the_smaller_side_leaves_nothing() -> None:
    update, fit = random_factors(0, r=40), random_factors(1)
    found = residual(update, fit, 30)
    assert found.rank == 24
    assert float((update.dense() - fit.dense() - found.dense()).norm()) < 1e-9 * float(update.dense().norm())


def test_residuals_refuse_an_empty_budget() -> None:
    f = random_factors(0)
    with pytest.raises(ValueError, match="budget is 0"):
        residual(f, f, 0)


def test_the_iterated_svd_of_a_large_target_is_the_dense_one() -> None:
    g = torch.Generator().manual_seed(0)
    left, right = (torch.randn(4, 150, 30, generator=g, dtype=F64) * 0.8 ** torch.arange(30) for _ in range(2))
    sigma = torch.randn(4, 4, 30, generator=g, dtype=F64)
    target = StackTarget.of(left, sigma, right)
    dense = torch.einsum("iuk,ijk,jvk->iujv", left, sigma, right).reshape(600, 600)
    fit: Fit = leading_svd(target, 5)
    approximation = torch.einsum("iuk,ijk,jvk->iujv", fit.left, fit.sigma, fit.right).reshape(600, 600)
    assert float((dense - approximation).norm()) == pytest.approx(tail(dense, 5), rel=1e-9)
