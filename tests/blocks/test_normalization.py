"""Normalizing Sigma leaves the update as it is."""

import pytest
import torch

from bora_fl.adapters.sigma import to_raw
from bora_fl.blocks import BlockFactors
from bora_fl.blocks.normalization import at_rank, normalize_sigma, transposed


def drawn(blocks, spread, shift, seed, plain_rows=False):
    g = torch.Generator().manual_seed(seed)
    log = spread * (2 * torch.rand(blocks, blocks, 3, generator=g, dtype=torch.float64) - 1) + shift
    log = log * 0 + shift if plain_rows else log
    B = torch.randn(8 * blocks, 3, generator=g, dtype=torch.float64)
    A = torch.randn(3, 8 * blocks, generator=g, dtype=torch.float64)
    return BlockFactors(B, log.exp(), A, 0.5)


@pytest.mark.parametrize("blocks", [1, 2, 8])
@pytest.mark.parametrize("spread", [0.3, 1.5, 2.0, 2.3])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 0.4])
def test_any_reachable_sigma_is_reached_exactly(blocks, spread, shift):
    for seed in range(3):
        f = drawn(blocks, spread, shift, seed)
        for keep in ("A", "B"):
            found = normalize_sigma(f, "exp_norm", keep)
            torch.testing.assert_close(found.dense(), f.dense(), rtol=1e-10, atol=1e-10)
            assert float(found.sigma.log().abs().mean()) == pytest.approx(1.0, abs=1e-9)
            to_raw(found.sigma, "exp_norm")


def test_a_sigma_in_range_is_left_as_it_is():
    f = drawn(4, 2.0, 0.0, 1)
    log = f.sigma.log()
    f = BlockFactors(f.B, (log / log.abs().mean()).exp(), f.A, f.scaling)
    assert normalize_sigma(f, "exp_norm") is f
    small = f.to(torch.float32)
    assert normalize_sigma(small, "exp_norm") is small


def test_a_constant_sigma_moves_its_scale_to_b():
    for shift in (0.0, 2.0, -1.0):
        f = drawn(2, 1.0, shift, 0, plain_rows=True)
        found = normalize_sigma(f, "exp_norm")
        torch.testing.assert_close(found.dense(), f.dense())
        assert float(found.sigma.log().abs().mean()) == pytest.approx(1.0)
        torch.testing.assert_close(found.A, f.A)


@pytest.mark.parametrize("blocks", [1, 4])
def test_one_factor_is_kept_where_it_can_be(blocks):
    f = drawn(blocks, 1.8, 0.3, 2)
    for keep in ("A", "B"):
        found = normalize_sigma(f, "exp_norm", keep)
        assert torch.equal(getattr(found, keep), getattr(f, keep))
        assert not torch.equal(found.B if keep == "A" else found.A, f.B if keep == "A" else f.A)
    far = drawn(4, 2.2, 0.3, 2)
    torch.testing.assert_close(normalize_sigma(far, "exp_norm").dense(), far.dense())


def test_one_block_without_a_transform_is_plain_lora():
    f = drawn(1, 1.0, 0.3, 3)
    found = normalize_sigma(f, "identity")
    assert bool((found.sigma == 1).all())
    torch.testing.assert_close(found.dense(), f.dense())
    blocks = drawn(2, 1.0, 0.3, 3)
    assert normalize_sigma(blocks, "identity") is blocks


@pytest.mark.parametrize("blocks", [1, 4])
def test_a_sigma_with_zeros_or_signs_is_fitted_into_the_range(blocks):
    f = drawn(blocks, 1.0, 0.0, 0)
    sigma = f.sigma.clone()
    sigma[0, 0] *= torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    odd = BlockFactors(f.B, sigma, f.A, f.scaling)
    found = normalize_sigma(odd, "exp_norm")
    to_raw(found.sigma, "exp_norm")
    error = float((found.dense() - odd.dense()).norm() / odd.dense().norm())
    assert error < 1e-12 if blocks == 1 else error < 0.5
    turned = normalize_sigma(BlockFactors(f.B, -f.sigma, f.A, f.scaling), "exp_norm")  # the sign moves into B
    torch.testing.assert_close(turned.dense(), -f.dense())


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("transform", ["exp_norm", "identity"])
def test_another_rank_keeps_the_components_of_most_energy_as_they_are(blocks, transform):
    f = normalize_sigma(drawn(blocks, 2.0, 0.0, 1), transform)
    small, large = at_rank(f, 2, transform), at_rank(f, 5, transform)
    order = f.component_energy().argsort(descending=True)
    kept = BlockFactors(f.B[:, order[:2]], f.sigma[..., order[:2]], f.A[order[:2]], f.scaling)
    torch.testing.assert_close(small.dense(), kept.dense())
    torch.testing.assert_close(large.dense(), f.dense())
    assert (small.rank, large.rank) == (2, 5)
    cosines = torch.nn.functional.cosine_similarity(small.A, kept.A)
    assert bool((cosines > 0.9).all())  # no rotation, no sign; columns may be scaled against each other
    for resized in (small, large):
        to_raw(resized.sigma, transform)  # raises where a model of this transform cannot take it


def test_a_sigma_that_no_gauge_reaches_is_fitted_into_the_range():
    """An interaction of mean|log| above 1 that no row or column scaling removes."""
    f = drawn(8, 3.5, 0.0, 0)
    found = normalize_sigma(f, "exp_norm")
    assert bool((found.sigma > 0).all())
    assert float(found.sigma.log().abs().mean()) == pytest.approx(1.0, abs=1e-6)
    assert float((found.dense() - f.dense()).norm() / f.dense().norm()) < 0.9


def test_transposing_twice_is_the_identity():
    f = drawn(4, 1.0, 0.0, 0)
    torch.testing.assert_close(transposed(f).dense(), f.dense().T)
    torch.testing.assert_close(transposed(transposed(f)).dense(), f.dense())
