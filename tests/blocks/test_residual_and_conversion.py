"""Residuals within a rank budget, other block counts, lower ranks and the Stiefel form, against dense float64."""

from __future__ import annotations

import pytest
import torch

from bora_fl.blocks import (
    StreamingMerge,
    compress,
    convert_blocks,
    distance,
    factor_mean,
    merge,
    refactorize,
    relative_error,
    residual,
    stiefel,
    truncate,
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
def test_a_residual_is_the_svd_for_one_block_and_better_than_it_for_more(budget: int, kind: str) -> None:
    clients, weights = drifting_clients(0, 5), [0.2] * 5
    merged = merge(clients, weights)
    fit = refactorize(merged, 4, start=factor_mean(clients, weights)).factors
    rest = merged.dense() - fit.dense()
    update = merged
    if kind == "cores":
        stream = StreamingMerge(16)
        for f, w in zip(clients, weights, strict=True):
            stream.add(f, w)
        update = stream.result()  # type: ignore[assignment]
    plain, block = residual(update, fit, budget, num_blocks=1), residual(update, fit, budget)
    assert (plain.num_blocks, plain.rank, block.num_blocks, block.rank) == (1, budget, 4, budget)
    assert float((rest - plain.dense()).norm()) == pytest.approx(tail(rest, budget), rel=1e-9)
    assert float((rest - block.dense()).norm()) < tail(rest, budget)


def test_enough_budget_leaves_nothing_and_a_perfect_fit_leaves_zero() -> None:
    clients, weights = drifting_clients(1, 2), [0.5, 0.5]
    merged = merge(clients, weights)
    fit = refactorize(merged, 4, start=factor_mean(clients, weights)).factors
    whole = residual(merged, fit, 12)
    assert float((merged.dense() - fit.dense() - whole.dense()).norm()) < 1e-13 * merged.norm()
    assert residual(clients[0], clients[0], 2).norm() < 1e-12 * clients[0].norm()


def test_residuals_refuse_an_empty_budget_and_foreign_blocks() -> None:
    f = random_factors(0)
    with pytest.raises(ValueError, match="budget is 0"):
        residual(f, f, 0)
    with pytest.raises(ValueError, match="num_blocks is 2"):
        residual(f, f, 1, num_blocks=2)


def test_the_iterated_svd_of_a_large_target_is_the_dense_one() -> None:
    g = torch.Generator().manual_seed(0)
    left, right = (torch.randn(4, 150, 30, generator=g, dtype=F64) * 0.8 ** torch.arange(30) for _ in range(2))
    sigma = torch.randn(4, 4, 30, generator=g, dtype=F64)
    target = StackTarget.of(left, sigma, right)
    dense = torch.einsum("iuk,ijk,jvk->iujv", left, sigma, right).reshape(600, 600)
    fit: Fit = leading_svd(target, 5)
    approximation = torch.einsum("iuk,ijk,jvk->iujv", fit.left, fit.sigma, fit.right).reshape(600, 600)
    assert float((dense - approximation).norm()) == pytest.approx(tail(dense, 5), rel=1e-9)


@pytest.mark.parametrize(
    ("b", "to", "rank"),
    [
        (4, 4, 3),
        (4, 8, 3),
        (4, 1, 12),
        (4, 2, 12),
        (8, 4, 12),
        (8, 1, 24),
        (2, 3, 6),
        (1, 8, 3),
        (6, 4, 18),
        (8, 6, 24),
    ],
)
def test_converting_blocks_is_exact_and_of_the_stated_rank(b: int, to: int, rank: int) -> None:
    f = random_factors(b, 24, 48, b=b)
    converted = convert_blocks(f, to)
    assert (converted.num_blocks, converted.rank) == (to, rank)
    torch.testing.assert_close(converted.dense(), f.dense())


def test_converting_to_a_lower_rank_fits() -> None:
    f = random_factors(0, 24, 48, b=4)
    fitted = convert_blocks(f, 1, rank=5)
    assert distance(fitted, convert_blocks(f, 1)) == pytest.approx(tail(f.dense(), 5), rel=1e-8)
    with pytest.raises(ValueError, match="does not divide"):
        convert_blocks(f, 5)


def test_compressing_beats_truncating() -> None:
    f = drifting_clients(2, 1, r=6)[0]
    for transform in ("identity", "exp_norm"):
        squeezed = compress(f, 3, sigma_transform=transform)
        assert squeezed.factors.rank == 3
        assert squeezed.relative_error < relative_error(truncate(f, 3), f)
        assert relative_error(squeezed.factors, f) == pytest.approx(squeezed.relative_error, rel=1e-6)


def test_the_stiefel_form_is_exact_for_one_block_and_a_fit_for_more() -> None:
    assert stiefel(random_factors(0, b=1)).relative_error < 1e-12
    several = stiefel(random_factors(0, b=4))
    blocks = several.factors.A.reshape(3, 4, 8).transpose(0, 1)
    torch.testing.assert_close(blocks @ blocks.mT, torch.eye(3, dtype=F64).expand(4, 3, 3), rtol=0, atol=1e-12)
    assert 0 < several.relative_error < 0.6
