import math

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge

from bora_fl.heads import ClassSums, Head, choose, gcv_penalty, interpolate, lda, scaled
from tests.heads.problems import problem, sums_of


@pytest.mark.parametrize("shrinkage", [0.001, 0.2, 0.9])
def test_lda_is_scikit_learns(shrinkage: float):
    x, y = problem()
    sums = sums_of(x, y)
    # Shrinkage s is (1 − s)(Σ_w + λI) with λ = s/(1 − s) · tr Σ_w / d.
    penalty = shrinkage / (1 - shrinkage) * float(sums.within_scatter().trace() / len(x) / 6)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x.numpy(), y.numpy())
    ours = lda(sums, penalty)
    scale = 1 - shrinkage
    between = lambda t: t - t.mean(0)  # noqa: E731  (what all classes share is no part of the answer)
    torch.testing.assert_close(between(ours.weight) / scale, between(torch.tensor(theirs.coef_)), rtol=1e-8, atol=1e-10)
    prior = torch.tensor(theirs.priors_).log()
    intercept = torch.tensor(theirs.intercept_) - prior
    torch.testing.assert_close(between(ours.bias - prior) / scale, between(intercept), rtol=1e-8, atol=1e-10)


def test_features_that_vary_little_around_their_mean_leave_a_head_that_float32_can_hold():
    x, y = problem()
    plain, moved = lda(sums_of(x, y), 0.1), lda(sums_of(x + 1e4, y), 0.1)
    torch.testing.assert_close(moved.weight, plain.weight, rtol=1e-4, atol=1e-6)
    wanted, found = plain(x).log_softmax(1), moved(x + 1e4).log_softmax(1)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def several(x: torch.Tensor) -> torch.Tensor:
    """Four classes of which an example may have none, one or more; one of them is every example's, one is nobody's."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(len(x), 2, generator=generator, dtype=torch.float64)
    labels = (x[:, :2] + 0.5 * x[:, 1:3] + noise > torch.tensor([0.3, 1.0])).double()
    return torch.cat([labels, torch.ones(len(x), 1), torch.zeros(len(x), 1)], 1)


@pytest.mark.parametrize("shrinkage", [0.001, 0.2, 0.9])
def test_each_of_several_classes_is_told_apart_as_scikit_learn_does(shrinkage: float):
    x = problem()[0]
    y = several(x)
    sums = ClassSums.of(x, y, 4)
    for label in (0, 1):
        mine = y[:, label].long()
        # Shrinkage s is (1 − s)(Σ_c + λI) with λ = s/(1 − s) · tr Σ_c / d.
        penalty = shrinkage / (1 - shrinkage) * float(sums_of(x, mine, 2).within_scatter().trace() / len(x) / 6)
        theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x.numpy(), mine.numpy())
        prior = float(torch.tensor(theirs.priors_[1] / theirs.priors_[0]).log())
        found = lda(sums, penalty)(x)[:, label] - prior
        expected = torch.tensor(theirs.decision_function(x.numpy())) - prior
        torch.testing.assert_close(found / (1 - shrinkage), expected, rtol=1e-8, atol=1e-9)
    head = lda(sums)
    assert (head(100 * x)[:, 2] == 10_000).all()
    assert (head(100 * x)[:, 3] == -10_000).all()
    assert lda(sums, bias=False)(x).isfinite().all()


def test_the_penalty_of_several_classes_is_that_of_their_ridge_regression():
    x = problem(60)[0]
    y = several(x)
    centred = x - x.mean(0)
    scale = float((centred.T @ centred / 60).trace() / 6)
    scores = {}
    for penalty in (torch.logspace(-4, 2, 31, dtype=torch.float64) * scale).tolist():
        model = Ridge(alpha=60 * penalty).fit(x.numpy(), y.numpy())
        residual = (y - torch.tensor(model.predict(x.numpy()))).square().sum()
        eigenvalues = torch.linalg.eigvalsh(centred.T @ centred / 60)
        freedom = 1 + float((eigenvalues / (eigenvalues + penalty)).sum())
        scores[penalty] = float(residual / (1 - freedom / 60) ** 2)
    assert gcv_penalty(ClassSums.of(x, y, 4)) == pytest.approx(min(scores, key=scores.__getitem__), rel=1e-9)


def test_a_rotation_of_the_features_rotates_the_head():
    x, y = problem()
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    plain, turned = lda(sums_of(x, y)), lda(sums_of(x @ rotation, y))
    torch.testing.assert_close(turned(x @ rotation), plain(x), rtol=1e-7, atol=1e-7)


def test_the_penalty_is_that_of_leave_one_out_with_equal_leverages():
    x, y = problem(60)
    sums = sums_of(x, y)
    targets = torch.nn.functional.one_hot(y, 3).double()
    centred = x - x.mean(0)
    scale = float((centred.T @ centred / 60).trace() / 6)
    scores = {}
    for penalty in (torch.logspace(-4, 1, 26, dtype=torch.float64) * scale).tolist():
        hat = centred @ torch.linalg.solve(
            centred.T @ centred + 60 * penalty * torch.eye(6, dtype=torch.float64), centred.T
        )
        hat = hat + 1 / 60
        residual = (targets - hat @ targets).square().sum()
        scores[penalty] = float(residual / (1 - hat.trace() / 60) ** 2)
    assert gcv_penalty(sums) == pytest.approx(min(scores, key=scores.__getitem__), rel=1e-9)


def test_a_class_without_examples_never_wins():
    x, y = problem()
    head = lda(sums_of(x, y, classes=5))
    assert head(100 * x).argmax(1).max() < 3
    torch.testing.assert_close(head(x)[:, :3], lda(sums_of(x, y))(x))
    flat = lda(sums_of(x, y, classes=5), bias=False)
    assert flat.bias is None
    assert flat(x).argmax(1).max() < 3


def test_without_bias_the_classes_stay_nearly_what_they_were():
    x, y = problem()
    with_bias, without = lda(sums_of(x + 5, y))(x + 5), lda(sums_of(x + 5, y), bias=False)(x + 5)
    assert (with_bias.argmax(1) == without.argmax(1)).double().mean() > 0.9


@pytest.mark.parametrize(("n", "d", "classes"), [(1, 4, 1), (1, 4, 3), (5, 40, 3), (3, 1, 2), (30, 6, 1)])
def test_odd_sizes_are_solved(n: int, d: int, classes: int):
    x, y = problem(n, d, classes)
    for bias in (True, False):
        head = lda(sums_of(x, y, classes), bias=bias)
        assert torch.isfinite(head(x)).all()
    if n == 5:  # more features than examples
        assert (lda(sums_of(x, y, classes), 1e-3)(x).argmax(1) == y).all()


def test_what_cannot_be_solved_is_refused():
    with pytest.raises(ValueError, match="at least one example"):
        lda(ClassSums.zeros(3, 4))
    with pytest.raises(ValueError, match="penalty = 0"):
        lda(sums_of(*problem()), 0.0)


def test_a_scale_keeps_the_classes_and_is_found_by_the_loss():
    x, y = problem()
    head = lda(sums_of(x, y))
    loud = Head(2 * head.weight, 2 * head.bias)
    heads = scaled(loud)
    assert all(torch.equal(h(x).argmax(1), head(x).argmax(1)) for h in heads.values())
    name, _ = choose(heads, lambda _, h: float(torch.nn.functional.cross_entropy(h(x), y)))
    assert name in {"x0.59", "x0.5", "x0.42"}  # the true classes are Gaussian: their posteriors are calibrated


def test_the_choice_is_by_loss_and_never_a_broken_head():
    x, y = problem()
    first, second = lda(sums_of(x, y)), lda(sums_of(x, (y + 1) % 3))
    middle = interpolate(first, second, 0.25)
    torch.testing.assert_close(middle(x), 0.75 * first(x) + 0.25 * second(x))
    heads = {"broken": Head(first.weight * math.nan, None), "bad": second, "middle": middle, "good": first}

    def loss(_: str, head: Head) -> float:
        return float(torch.nn.functional.cross_entropy(head(x), y))

    assert choose(heads, loss)[0] == "good"
    assert choose({"a": first, "b": first}, loss)[0] == "a"
    assert choose({"broken": heads["broken"]}, loss)[0] == "broken"
    with pytest.raises(ValueError, match="no head"):
        choose({}, loss)


@pytest.mark.parametrize("twice", [0, 2])
def test_fewer_examples_than_features_are_not_fitted_whole(twice: int):
    """A few examples that are there twice draw generalized cross-validation to a λ of nearly nothing."""
    generator = torch.Generator().manual_seed(3)
    d, n = 120, 60
    direction = torch.randn(d, generator=generator, dtype=torch.float64)

    def draw(count: int):
        y = torch.randint(0, 2, (count,), generator=generator)
        noise = torch.randn(count, d, generator=generator, dtype=torch.float64)
        return noise + 0.3 * direction * (2 * y[:, None] - 1), y

    (x, y), (fresh, answers) = draw(n), draw(400)
    x, y = torch.cat([x, x[:twice]]), torch.cat([y, y[:twice]])
    logits = lda(ClassSums.of(x, y, 2))(fresh)
    assert float((logits.argmax(1) == answers).double().mean()) > 0.8
    assert float(torch.nn.functional.cross_entropy(logits, answers)) < 1.0
