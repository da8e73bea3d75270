"""The best B alone, against dense least squares in float64."""

import pytest
import torch

from bora_fl.blocks import BlockFactors, factor_mean, merge, refactorize, relative_error
from bora_fl.blocks.left_fit import fit_left
from bora_fl.blocks.planted import drifting_clients

WEIGHTS = [0.1, 0.3, 0.2, 0.25, 0.15]


def clients(num_blocks: int, ranks: tuple[int, ...] = (3,) * 5) -> list[BlockFactors]:
    whole = drifting_clients(0, len(ranks), 24, 16, num_blocks, max(ranks))
    return [BlockFactors(f.B[:, :r], f.sigma[..., :r], f.A[:r], 1.5) for f, r in zip(whole, ranks, strict=True)]


def dense_best(target: torch.Tensor, start: BlockFactors) -> torch.Tensor:
    """Row block by row block, `lstsq` on the dense design `[D_i1 A_1 … D_ib A_b]`."""
    b, (m, n) = start.num_blocks, start.shape
    A = start.A.double().reshape(start.rank, b, n // b)
    rows = []
    for i in range(b):
        design = (start.scaling * start.sigma[i].double().T[:, :, None] * A).reshape(start.rank, n)
        goal = target[i * m // b : (i + 1) * m // b]
        rows.append(torch.linalg.lstsq(design.T, goal.T).solution.T @ design)
    return torch.cat(rows)


@pytest.mark.parametrize("transform", ["identity", "exp_norm"])
@pytest.mark.parametrize("num_blocks", [1, 2, 4])
@pytest.mark.parametrize("ranks", [(3,) * 5, (1, 3, 2, 3, 1)])
def test_it_is_the_dense_least_squares_solution(transform: str, num_blocks: int, ranks: tuple[int, ...]):
    given = clients(num_blocks, ranks)
    start = factor_mean(given, WEIGHTS)
    fit = fit_left(given, WEIGHTS, start, transform)
    assert fit is not None
    assert fit.rank == 3
    wanted = dense_best(merge(given, WEIGHTS).dense(), start)
    assert float((fit.dense() - wanted).norm() / wanted.norm()) < 1e-10
    if transform == "exp_norm":
        assert float(fit.sigma.log().abs().mean()) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("transform", ["identity", "exp_norm"])
def test_it_is_the_refactorization_of_b_alone_however_many_parts_there_are(transform: str):
    given = [f.to(torch.float32) for f in drifting_clients(1, 40, 32, 24, 4, 8)]  # several groups of parts
    weights = [1 / 40] * 40
    start = factor_mean(given, weights)
    fit = fit_left(given, weights, start, transform)
    assert fit is not None
    assert fit.B.dtype == torch.float32
    known = refactorize(merge(given, weights), 8, start=start, sigma_transform=transform, only_B=True)
    assert relative_error(fit, known.factors) < 1e-6
    assert relative_error(fit, merge(given, weights)) <= (1 + 1e-6) * relative_error(start, merge(given, weights))


def test_one_part_of_the_starts_rank_is_kept():
    (given,) = clients(4, (3,))
    fit = fit_left([given], [1.0], given, "exp_norm")
    assert fit is not None
    assert relative_error(fit, given) < 1e-10


def test_parts_that_cancel_leave_nothing():
    f, *_ = clients(2)
    fit = fit_left([f, f], [1.0, -1.0], f, "identity")
    assert fit is not None
    assert bool((fit.B == 0).all())
    assert bool(fit.A.any())


def test_a_sigma_out_of_reach_is_told():
    f, *_ = clients(2)
    sigma = torch.ones_like(f.sigma)
    sigma[0, 0] = sigma[1, 1] = 1e-30  # no shift of rows and columns evens that out
    assert fit_left([f], [1.0], BlockFactors(f.B, sigma, f.A), "exp_norm") is None
