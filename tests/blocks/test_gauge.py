"""The canonical form: the update stays, the freedom goes, the range is met."""

from __future__ import annotations

import pytest
import torch

from bora_fl.blocks import BlockFactors, distance, fix_gauge
from bora_fl.blocks.gauge import INITIAL_ROW_NORM, block_row_norms
from bora_fl.blocks.planted import F64, random_factors


def regauged(f: BlockFactors, seed: int, signs: bool) -> BlockFactors:
    """The same update in a random gauge."""
    g = torch.Generator().manual_seed(seed)
    b, r, (m, n) = f.num_blocks, f.rank, f.shape
    alpha, beta = torch.exp(torch.randn(2, b, r, generator=g, dtype=F64))
    if signs:
        alpha, beta = (
            alpha * (torch.rand(b, r, generator=g) - 0.5).sign(),
            beta * (torch.rand(b, r, generator=g) - 0.5).sign(),
        )
    order = torch.randperm(r, generator=g)
    B = (f.B.reshape(b, m // b, r) * alpha.unsqueeze(1)).reshape(m, r)
    A = (f.A.reshape(r, b, n // b) * beta.T.unsqueeze(2)).reshape(r, n)
    sigma = f.sigma / alpha.unsqueeze(1) / beta.unsqueeze(0)
    return BlockFactors(B[:, order], sigma[..., order], A[order], f.scaling)


@pytest.mark.parametrize("transform", ["identity", "exp_norm"])
@pytest.mark.parametrize("b", [1, 2, 4])
def test_the_gauge_is_unique_idempotent_and_leaves_the_update(transform: str, b: int) -> None:
    f = random_factors(b, b=b, positive=True)
    fixed = fix_gauge(f, sigma_transform=transform)
    assert distance(fixed, f) < 1e-13 * f.norm()
    for seed in range(5):
        same = fix_gauge(regauged(f, seed, signs=True), sigma_transform=transform)
        for name in ("B", "sigma", "A"):
            torch.testing.assert_close(getattr(same, name), getattr(fixed, name), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("b", [1, 2, 4, 8])
def test_exp_norm_gauge_is_in_range_with_rows_at_their_norms(b: int) -> None:
    f = random_factors(b, b=b, positive=True)
    fixed = fix_gauge(f, sigma_transform="exp_norm", row_norms=2.0)
    assert bool((fixed.sigma > 0).all())
    assert float(fixed.sigma.log().abs().mean()) == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(fixed.A.norm(dim=1), torch.full((3,), 2.0, dtype=F64))
    energy = fixed.component_energy()
    assert bool((energy.diff() <= 0).all())


def test_a_constant_sigma_reaches_the_range_too() -> None:
    f = random_factors(0, b=4)
    level = (f.A.reshape(3, 4, 8) / f.A.reshape(3, 4, 8).norm(dim=2, keepdim=True)).reshape(3, 32)
    lora_like = BlockFactors(f.B, torch.full_like(f.sigma, 0.37), level, f.scaling)
    fixed = fix_gauge(lora_like, sigma_transform="exp_norm")
    torch.testing.assert_close(fixed.sigma, torch.full_like(f.sigma, torch.e))
    assert distance(fixed, lora_like) < 1e-13 * lora_like.norm()


def test_identity_gauge_of_one_block_is_plain_lora() -> None:
    f = random_factors(1, b=1)
    fixed = fix_gauge(f)
    torch.testing.assert_close(fixed.sigma, torch.ones(1, 1, 3, dtype=F64))
    torch.testing.assert_close(fixed.A.norm(dim=1), torch.full((3,), INITIAL_ROW_NORM, dtype=F64))


def test_block_row_norms_are_taken_block_by_block() -> None:
    f = random_factors(2)
    wanted = torch.rand(4, 3, dtype=F64, generator=torch.Generator().manual_seed(0)) + 0.5
    fixed = fix_gauge(f, row_norms=wanted)
    order = torch.argsort(f.component_energy(), descending=True)
    torch.testing.assert_close(block_row_norms(fixed), wanted[:, order])


def test_what_no_gauge_can_bring_into_range_is_refused() -> None:
    f = random_factors(3)
    assert not bool((f.sigma > 0).all())
    with pytest.raises(ValueError, match="positive"):
        fix_gauge(f, sigma_transform="exp_norm")
    far = BlockFactors(f.B, torch.exp(8 * torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(0))), f.A)
    with pytest.raises(ValueError, match="too far"):
        fix_gauge(far, sigma_transform="exp_norm")
    with pytest.raises(ValueError, match="use one of"):
        fix_gauge(f, sigma_transform="log")


def test_components_without_energy_keep_their_direction_and_a_usable_sigma() -> None:
    f = random_factors(4, positive=True)
    B = f.B.clone()
    B[:, 1] = 0
    for transform in ("identity", "exp_norm"):
        fixed = fix_gauge(BlockFactors(B, f.sigma, f.A, f.scaling), sigma_transform=transform)
        cosine = torch.nn.functional.cosine_similarity(fixed.A[2].reshape(4, -1), f.A[1].reshape(4, -1)).abs()
        torch.testing.assert_close(cosine, torch.ones(4, dtype=F64))
        assert float(fixed.B[:, 2].abs().max()) == 0
        assert bool((fixed.sigma[..., 2] > 0).all())
