"""Norms of combinations: every way of computing them against the dense matrices."""

import pytest
import torch

from bora_fl.blocks import BlockFactors, merge
from bora_fl.strategies import products
from bora_fl.strategies.products import cheap_sizes, image, sizes

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


def test_the_image_of_vectors_is_that_of_the_dense_sum():
    factors = [drawn(k, rank) for k, rank in enumerate((2, 30, 5))]
    vectors = torch.randn(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = merge(factors, [0.5, -2.0, 0.1]).dense() @ vectors.reshape(18, 4)
    found = image(factors, [0.5, -2.0, 0.1], vectors)
    torch.testing.assert_close(found.reshape(24, 4), wanted, rtol=1e-12, atol=1e-12 * float(wanted.norm()))


def test_what_is_only_reported_is_exact_while_cheap_and_else_close(monkeypatch: pytest.MonkeyPatch):
    stack, other = [drawn(k, 30) for k in range(3)], drawn(4, 8)
    sums = [(stack, [0.2, 0.3, 0.5]), ([other], [1.0])]
    combinations = [[1.0, 0.0], [1.0, -1.0], [0.0, 0.0]]
    wanted = sizes([merge(*sums[0]), other], combinations)
    assert cheap_sizes(sums, combinations) == wanted
    monkeypatch.setattr(products, "_CHEAP_PRODUCTS", 0)
    found = cheap_sizes(sums, combinations)
    assert found == pytest.approx(wanted, rel=0.4)
    assert found[:2] != pytest.approx(wanted[:2], rel=1e-6)
    assert found[2] == 0.0
