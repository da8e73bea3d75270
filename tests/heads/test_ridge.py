"""The head that predicts a number: from sums over the clients' examples, with and without noise."""

import dataclasses
import math

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from bora_fl.heads import (
    ClassSums,
    check_release,
    most_weight,
    narrow,
    release,
    ridge,
    solve_private_number,
    widen,
)
from bora_fl.heads.features import clip
from bora_fl.heads.private import NUMBER_SHARES, noise_stds
from bora_fl.privacy.gaussian import SeededRandomness
from tests.heads.problems import problem


def numbers(n: int = 400, d: int = 6) -> tuple[Tensor, Tensor]:
    """Features, and numbers around 7 that are partly linear in them."""
    x, _ = problem(n, d)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(d, generator=generator, dtype=torch.float64)
    return x, 7 + x @ weight + 3 * torch.randn(n, generator=generator, dtype=torch.float64)


def sums_of(x: Tensor, y: Tensor) -> ClassSums:
    return ClassSums.of(x, y, 1)


def test_the_sums_are_those_of_a_loop():
    x, y = numbers(20)
    whole = sums_of(x, y)
    assert (whole.counts.tolist(), whole.examples) == ([20.0], 20)
    rows = [torch.cat([row, number[None]]) for row, number in zip(x, y, strict=True)]
    torch.testing.assert_close(whole.sums, sum(rows)[None])
    torch.testing.assert_close(whole.gram, sum(torch.outer(row, row) for row in rows))


@pytest.mark.parametrize("penalty", [1e-4, 0.3, 40.0])
@pytest.mark.parametrize("bias", [True, False])
def test_ridge_is_scikit_learns(penalty: float, bias: bool):
    x, y = numbers()
    theirs = Ridge(alpha=400 * penalty, fit_intercept=bias).fit(x.numpy(), y.numpy())
    parts = [sums_of(x[rows], y[rows]) for rows in torch.arange(400).split([1, 250, 149])]
    ours = ridge(parts[0] + parts[1] + parts[2], penalty, bias=bias)
    torch.testing.assert_close(ours.weight[0], torch.tensor(theirs.coef_), rtol=1e-8, atol=1e-10)
    assert (ours.bias is not None) is bias
    torch.testing.assert_close(ours(x)[:, 0], torch.tensor(theirs.predict(x.numpy())), rtol=1e-8, atol=1e-8)


def test_the_penalty_is_that_of_generalized_cross_validation():
    x, y = numbers(60)
    centred = x - x.mean(0)
    scale = float((centred.T @ centred / 60).trace() / 6)
    scores = {}
    for penalty in (torch.logspace(-4, 2, 31, dtype=torch.float64) * scale).tolist():
        ridged = centred.T @ centred + 60 * penalty * torch.eye(6, dtype=torch.float64)
        hat = centred @ torch.linalg.solve(ridged, centred.T) + 1 / 60
        scores[penalty] = float((y - hat @ y).square().sum() / (1 - hat.trace() / 60) ** 2)
    best = min(scores, key=scores.__getitem__)
    assert 1e-3 < best / scale < 1  # the test would prove little at an end of the grid
    torch.testing.assert_close(ridge(sums_of(x, y))(x), ridge(sums_of(x, y), best)(x), rtol=1e-9, atol=1e-9)


def test_a_layer_without_bias_has_a_penalty_of_its_own():
    """That of the covariances would shrink the mean away where the features tell little else."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 64, generator=generator, dtype=torch.float64) + 1
    y = 5 + 0.02 * x[:, 0] + torch.randn(400, generator=generator, dtype=torch.float64)
    assert float((ridge(sums_of(x, y), bias=False)(x)[:, 0] - y).square().mean()) < 1.5
    scale = float((x.T @ x / 400).trace() / 64)
    scores = {}
    for penalty in (torch.logspace(-4, 2, 31, dtype=torch.float64) * scale).tolist():
        hat = x @ torch.linalg.solve(x.T @ x + 400 * penalty * torch.eye(64, dtype=torch.float64), x.T)
        scores[penalty] = float((y - hat @ y).square().sum() / (1 - (1 + hat.trace()) / 400) ** 2)
    best = ridge(sums_of(x, y), min(scores, key=scores.__getitem__), bias=False)
    torch.testing.assert_close(ridge(sums_of(x, y), bias=False)(x), best(x))


@pytest.mark.parametrize(("factor", "shift"), [(1e-4, 0.0), (-30.0, 1e4)])
def test_other_units_of_the_numbers_are_those_of_the_predictions(factor: float, shift: float):
    x, y = numbers(60)
    plain, other = ridge(sums_of(x, y)), ridge(sums_of(x, factor * y + shift))
    torch.testing.assert_close(other(x), factor * plain(x) + shift, rtol=1e-6, atol=1e-6 * abs(factor))


def test_features_that_vary_little_around_their_mean_lose_nothing():
    x, y = numbers()
    torch.testing.assert_close(ridge(sums_of(x + 1e4, y))(x + 1e4), ridge(sums_of(x, y))(x), rtol=1e-4, atol=1e-4)


def test_numbers_that_are_all_alike_are_predicted_as_they_are():
    x, _ = numbers()
    head = ridge(sums_of(x, torch.full((400,), 2.5, dtype=torch.float64)))
    torch.testing.assert_close(head(x), torch.full((400, 1), 2.5, dtype=torch.float64))
    with pytest.raises(ValueError, match="at least one example"):
        ridge(ClassSums.zeros(1, 7))
    with pytest.raises(ValueError, match="penalty = 0"):
        ridge(sums_of(*numbers()), 0.0)


def test_narrowed_features_beside_the_number_give_a_head_for_the_whole_ones():
    x, y = numbers(d=12)
    head = ridge(sums_of(narrow(x, 5), y))
    torch.testing.assert_close(widen(head, 12)(x), head(narrow(x, 5)))


@pytest.mark.parametrize("n", [1, 2, 5, 400])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_honest_sums_pass_and_come_back(n: int, scale: float):
    x, y = numbers(n)
    whole = sums_of(x, scale * y)
    back = ClassSums.from_tensors(whole.to_tensors(), 1, 7)
    back.check(number=True)
    torch.testing.assert_close(back.gram, whole.gram, rtol=1e-5, atol=1e-5 * max(scale, 1.0) ** 2)
    torch.testing.assert_close(ClassSums.from_vector(whole.to_vector(), 1, 7).gram, whole.gram)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
@pytest.mark.parametrize("lie", ["larger products", "smaller squares", "larger sum", "negative features"])
def test_sums_of_no_examples_are_rejected_in_any_unit_of_the_numbers(lie: str, scale: float):
    x, y = numbers()
    honest = sums_of(x, scale * y)
    honest.check(number=True)
    gram, sums = honest.gram.clone(), honest.sums.clone()
    if lie == "larger products":
        gram[-1, :-1] *= 2
        gram[:-1, -1] *= 2
    elif lie == "smaller squares":
        gram[-1, -1] *= 0.5
    elif lie == "larger sum":
        sums[0, -1] *= 2
    else:
        gram[:-1, :-1] *= -1
    with pytest.raises(ValueError, match="the head's"):
        dataclasses.replace(honest, gram=gram, sums=sums).check(number=True)


@pytest.mark.parametrize("value", [300000.1, 1e6 / 7, -50000.3, 0.0])
def test_a_client_whose_numbers_are_all_alike_is_honest(value: float):
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(451, 384, generator=generator, dtype=torch.float64), dim=1)
    sums = sums_of(x, torch.full((451,), value, dtype=torch.float64))
    ClassSums.from_tensors(sums.to_tensors(), 1, 385).check(number=True)


def bounded(x: Tensor, y: Tensor, clip_norm: float, low: float, high: float) -> ClassSums:
    """The sums that a release is made of, by their definition."""
    brought = (y.clamp(low, high) - (low + high) / 2) / ((high - low) / 2)
    return sums_of(clip(x, clip_norm) / math.sqrt(2), brought / math.sqrt(2))


@pytest.mark.parametrize("clip_norm", [0.5, 100.0])
@pytest.mark.parametrize("bounds", [(6.9, 7.1), (-1e6, 1e6)])
def test_no_neighbour_moves_the_sums_by_more_than_the_noise_is_for(clip_norm: float, bounds: tuple[float, float]):
    x, y = numbers(60)
    x[0] *= 1e8
    y[1] = -1e8
    whole, distances = bounded(x, y, clip_norm, *bounds), []
    for left_out in range(60):
        kept = torch.arange(60) != left_out
        less = bounded(x[kept], y[kept], clip_norm, *bounds)
        gram = whole.gram - less.gram
        triangle = torch.triu(gram, 1) * math.sqrt(2) + torch.diag(gram.diagonal())
        parts = [whole.counts - less.counts, whole.sums - less.sums, triangle]
        moved = sum(f * float(part.square().sum()) for f, part in zip(NUMBER_SHARES, parts, strict=True))
        distances.append(math.sqrt(moved))
    assert max(distances) <= 1 + 1e-12
    if clip_norm < 1 and bounds[0] > 0:
        assert max(distances) > 0.999  # the bound is reached
    assert list(noise_stds(2.0, number=True)) == pytest.approx([2 / math.sqrt(share) for share in NUMBER_SHARES])
    assert sum(NUMBER_SHARES) == pytest.approx(1)


@pytest.mark.parametrize("bounds", [(-40.0, 60.0), (-100.0, 30.0)])
def test_little_noise_leaves_the_head_as_it_is(bounds: tuple[float, float]):
    x, y = numbers(2000)
    sums = bounded(x, y, 50.0, *bounds)
    head = solve_private_number(release(sums, 1e-6, SeededRandomness(0), number=True), 1e-6, 1, 50.0, bounds)
    plain = ridge(sums_of(x, y), 1e-9)
    torch.testing.assert_close(head(x), plain(x), rtol=1e-2, atol=1e-2)
    noised = release(sums, 1e-6, SeededRandomness(0), number=True)
    flat = solve_private_number(noised, 1e-6, 1, 50.0, bounds, bias=False)
    without = ridge(sums_of(x, y), 1e-9, bias=False)
    torch.testing.assert_close(flat(x), without(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("noise", [1.0, 1e4])
@pytest.mark.parametrize("bias", [True, False])
def test_much_noise_gives_a_finite_head(noise: float, bias: bool):
    noised = release(bounded(*numbers(50), 5.0, -10.0, 20.0), noise, SeededRandomness(0), number=True)
    head = solve_private_number(noised, noise, 1, 5.0, (-10.0, 20.0), bias=bias)
    assert torch.isfinite(head(numbers(50)[0])).all()
    assert (head.bias is None) is not bias
    with pytest.raises(ValueError, match="noise_multiplier = 0"):
        solve_private_number(noised, 0.0, 1, 5.0, (-10.0, 20.0))


@pytest.mark.parametrize("noise", [0.5, 30.0])
@pytest.mark.parametrize("examples", [1, 400])
def test_honest_releases_pass_and_lies_do_not(noise: float, examples: int):
    x, y = numbers()
    sums = bounded(x[:examples], y[:examples], 0.5, 0.0, 14.0)
    for seed in range(30):
        sent = release(sums, noise, SeededRandomness(seed), number=True).to_tensors()
        check_release(ClassSums.from_tensors(sent, 1, 7), noise, number=True)
    honest = release(sums, noise, SeededRandomness(0), number=True)
    for lie in ({"sums": honest.sums + 1e6}, {"gram": honest.gram + 1e6}, {"counts": honest.counts - 1e6}):
        with pytest.raises(ValueError, match="the head's noised"):
            check_release(dataclasses.replace(honest, **lie), noise, number=True)
    assert most_weight([], 1, noise, number=True) == pytest.approx(10 * noise_stds(noise, number=True)[0])
