"""Bringing Sigma into range leaves the update as it is."""

import pytest
import torch

from bora_fl.adapters.sigma import to_raw
from bora_fl.blocks import BlockFactors
from bora_fl.strategies.sigma_range import restore_range, transpose


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
        for keep_A in (False, True):
            found = restore_range(f, "exp_norm", keep_A=keep_A)
            torch.testing.assert_close(found.dense(), f.dense(), rtol=1e-10, atol=1e-10)
            assert float(found.sigma.log().abs().mean()) == pytest.approx(1.0, abs=1e-9)
            to_raw(found.sigma, "exp_norm")


def test_a_sigma_in_range_is_left_as_it_is():
    f = drawn(4, 2.0, 0.0, 1)
    log = f.sigma.log()
    f = BlockFactors(f.B, (log / log.abs().mean()).exp(), f.A, f.scaling)
    found = restore_range(f, "exp_norm")
    for before, after in ((f.B, found.B), (f.sigma, found.sigma), (f.A, found.A)):
        torch.testing.assert_close(after, before, rtol=1e-12, atol=0.0)


def test_a_constant_sigma_moves_its_scale_to_b():
    for shift in (0.0, 2.0, -1.0):
        f = drawn(2, 1.0, shift, 0, plain_rows=True)
        found = restore_range(f, "exp_norm")
        torch.testing.assert_close(found.dense(), f.dense())
        assert float(found.sigma.log().abs().mean()) == pytest.approx(1.0)
        torch.testing.assert_close(found.A, f.A)


def test_a_is_kept_where_it_can_be():
    f = drawn(4, 2.2, 0.3, 2)
    assert torch.equal(restore_range(f, "exp_norm", keep_A=True).A, f.A)
    assert not torch.equal(restore_range(f, "exp_norm").A, f.A)


def test_one_block_without_a_transform_is_plain_lora():
    f = drawn(1, 1.0, 0.3, 3)
    found = restore_range(f, "identity")
    assert bool((found.sigma == 1).all())
    torch.testing.assert_close(found.dense(), f.dense())
    blocks = drawn(2, 1.0, 0.3, 3)
    assert restore_range(blocks, "identity") is blocks


def test_a_sigma_that_is_not_positive_is_refused():
    f = drawn(2, 1.0, 0.0, 0)
    with pytest.raises(ValueError, match="not positive"):
        restore_range(BlockFactors(f.B, -f.sigma, f.A, 1.0), "exp_norm")


def test_a_sigma_that_no_gauge_reaches_is_fitted_into_the_range():
    """An interaction of mean|log| above 1 that no row or column scaling removes."""
    f = drawn(8, 3.5, 0.0, 0)
    found = restore_range(f, "exp_norm")
    assert bool((found.sigma > 0).all())
    assert float(found.sigma.log().abs().mean()) == pytest.approx(1.0, abs=1e-6)
    assert float((found.dense() - f.dense()).norm() / f.dense().norm()) < 0.9


def test_transposing_twice_is_the_identity():
    f = drawn(4, 1.0, 0.0, 0)
    torch.testing.assert_close(transpose(f).dense(), f.dense().T)
    torch.testing.assert_close(transpose(transpose(f)).dense(), f.dense())
