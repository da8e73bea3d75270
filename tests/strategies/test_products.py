"""Norms of combinations: every way of computing them against the dense matrices."""

import pytest
import torch

from bora_fl.blocks import BlockFactors, merge
from bora_fl.strategies import products
from bora_fl.strategies.products import sizes

COMBINATIONS = [[1.0, 0.0, 0.0], [1.0, -1.0, 0.0], [0.5, 2.0, -1.0]]


def drawn(seed: int, rank: int) -> BlockFactors:
    g = torch.Generator().manual_seed(seed)
    parts = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((24, rank), (3, 3, rank), (rank, 18)))
    return BlockFactors(*parts, 1.5)


@pytest.mark.parametrize("ranks", [(2, 3, 1), (40, 9, 30)])
def test_norms_are_those_of_the_dense_combinations(ranks: tuple[int, int, int]):
    factors = [drawn(k, rank) for k, rank in enumerate(ranks)]
    wanted = [float(merge(factors, weights).dense().norm()) for weights in COMBINATIONS]
    assert sizes(factors, COMBINATIONS) == pytest.approx(wanted, rel=1e-10)


def test_an_update_minus_itself_is_nothing_however_many_components_it_has():
    factors = drawn(0, 60)
    assert sizes([factors, factors], [[1.0, -1.0]])[0] < 1e-12 * factors.norm()


def test_estimates_for_very_many_components_are_close_and_keep_zero(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "_MOST_PRODUCTS", 0)
    factors = [drawn(k, 30) for k in range(3)]
    wanted = [float(merge(factors, weights).dense().norm()) for weights in COMBINATIONS]
    assert sizes(factors, COMBINATIONS) == pytest.approx(wanted, rel=0.15)
    assert sizes(factors, COMBINATIONS) != pytest.approx(wanted, rel=1e-6)
    assert sizes([factors[0], factors[0]], [[1.0, -1.0]])[0] < 1e-12 * factors[0].norm()
