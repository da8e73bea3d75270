"""Block factors against dense float64 matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bora_fl.blocks import BlockFactors, distance, effective_rank, factor_mean, merge, padded, truncate
from bora_fl.blocks.planted import random_factors


def by_definition(f: BlockFactors) -> torch.Tensor:
    """delta_W block by block, from the formula."""
    b, (m, n) = f.num_blocks, f.shape
    p, q = m // b, n // b
    out = torch.full((m, n), float("nan"), dtype=torch.float64)
    for i in range(b):
        for j in range(b):
            B_i, A_j = f.B[i * p : (i + 1) * p].double(), f.A[:, j * q : (j + 1) * q].double()
            out[i * p : (i + 1) * p, j * q : (j + 1) * q] = f.scaling * B_i @ torch.diag(f.sigma[i, j].double()) @ A_j
    return out


@pytest.mark.parametrize("b", [1, 2, 4, 8])
def test_dense_lora_and_norm_agree_with_the_definition(b: int) -> None:
    f = random_factors(b, b=b)
    dense = by_definition(f)
    lora_b, lora_a = f.to_lora()
    assert lora_b.shape == (24, b * 3)
    assert lora_a.shape == (b * 3, 32)
    torch.testing.assert_close(f.dense(), dense)
    torch.testing.assert_close(lora_b @ lora_a, dense)
    assert f.norm() == pytest.approx(float(dense.norm()), rel=1e-13)


def test_component_energies_are_the_energies_of_the_components_alone() -> None:
    f = random_factors(1)
    alone = [
        by_definition(BlockFactors(f.B[:, k : k + 1], f.sigma[..., k : k + 1], f.A[k : k + 1], f.scaling))
        .square()
        .sum()
        for k in range(f.rank)
    ]
    torch.testing.assert_close(f.component_energy(), torch.stack(alone))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_truncation_keeps_the_most_energetic_components(rank: int) -> None:
    f = random_factors(2)
    kept = truncate(f, rank).component_energy()
    torch.testing.assert_close(kept, f.component_energy().sort(descending=True).values[:rank])


def test_padding_adds_trainable_components_and_changes_nothing() -> None:
    f = random_factors(2)
    more = padded(f, 5)
    assert more.rank == 5
    torch.testing.assert_close(by_definition(more), by_definition(f), rtol=0, atol=0)
    assert bool((more.A[3:].norm(dim=1) > 0.1).all())
    assert bool((more.B[:, 3:] == 0).all())
    with pytest.raises(ValueError, match="at least 3"):
        padded(f, 2)


def test_merge_is_the_weighted_sum_of_products_for_any_ranks_and_scalings() -> None:
    clients = [random_factors(k, r=r, scaling=s) for k, (r, s) in enumerate([(3, 0.5), (1, 2.0), (5, 1.25)])]
    weights = [0.2, 0.5, -0.3]
    expected = sum(w * by_definition(f) for w, f in zip(weights, clients, strict=True))
    merged = merge(clients, weights)
    assert merged.rank == 9
    torch.testing.assert_close(by_definition(merged), expected)


def test_distance_agrees_with_dense() -> None:
    f, g = random_factors(3), random_factors(4, r=5, scaling=2.0)
    dense_f, dense_g = by_definition(f), by_definition(g)
    assert distance(f, g) == pytest.approx(float((dense_f - dense_g).norm()), rel=1e-12)


def test_distance_is_accurate_between_nearly_equal_updates() -> None:
    f = random_factors(5)
    g = BlockFactors(f.B, f.sigma, f.A, f.scaling * (1 + 1e-11))
    assert distance(f, g) == pytest.approx(1e-11 * f.norm(), rel=1e-4)


def test_factor_mean_averages_each_factor_and_pads_smaller_clients_with_zeros() -> None:
    f, g = random_factors(6), random_factors(7, r=5)
    mean = factor_mean([f, g], [1.0, 3.0])
    padded_b = torch.cat([f.B, torch.zeros(24, 2, dtype=torch.float64)], 1)
    torch.testing.assert_close(mean.B, 0.25 * padded_b + 0.75 * g.B)
    torch.testing.assert_close(mean.sigma[..., :3], 0.25 * f.sigma + 0.75 * g.sigma[..., :3])
    torch.testing.assert_close(mean.sigma[..., 3:], g.sigma[..., 3:])
    torch.testing.assert_close(mean.A[:3], 0.25 * f.A + 0.75 * g.A[:3])


@pytest.mark.parametrize(
    ("B", "sigma", "A", "says"),
    [
        ((24, 3), (4, 4, 2), (3, 32), "rank"),
        ((24, 3), (4, 3, 3), (3, 32), "blocks"),
        ((24, 3), (5, 5, 3), (3, 32), "divide"),
        ((24,), (4, 4, 3), (3, 32), "shapes"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(B: tuple[int], sigma: tuple[int], A: tuple[int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        BlockFactors(torch.zeros(B), torch.zeros(sigma), torch.zeros(A))


def test_merging_different_layers_or_bad_weights_is_refused() -> None:
    f = random_factors(8)
    with pytest.raises(ValueError, match="at least one"):
        merge([], [])
    with pytest.raises(ValueError, match="one weight"):
        merge([f], [1.0, 2.0])
    with pytest.raises(ValueError, match="finite"):
        merge([f], [float("nan")])
    with pytest.raises(ValueError, match="blocks"):
        merge([f, random_factors(9, b=2)], [1.0, 1.0])
    with pytest.raises(ValueError, match="non-negative"):
        factor_mean([f], [-1.0])


@pytest.mark.parametrize("b", [1, 2, 4, 8])
def test_effective_rank_is_the_entropy_of_the_dense_updates_singular_values(b: int) -> None:
    f = random_factors(6, b=b)
    values = np.linalg.svd(by_definition(f).numpy(), compute_uv=False)
    shares = values / values.sum()
    wanted = np.exp(-sum(share * np.log(share) for share in shares if share > 1e-12))
    assert effective_rank(f) == pytest.approx(wanted, rel=1e-6)
    assert 1 <= effective_rank(f) <= 3 * b


def test_effective_rank_of_equal_directions_is_their_number_and_of_nothing_zero() -> None:
    Q = torch.linalg.qr(torch.randn(24, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    f = BlockFactors(Q, torch.ones(1, 1, 3, dtype=torch.float64), Q.T.contiguous(), 2.0)
    assert effective_rank(f) == pytest.approx(3)
    assert effective_rank(BlockFactors(0 * f.B, f.sigma, f.A, 2.0)) == 0
