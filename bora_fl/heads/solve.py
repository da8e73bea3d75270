"""Linear discriminant analysis, and ridge regression of a number, from `ClassSums`, in float64.

With `μ_c = S_c / n_c`, their common mean `m = Σ_c S_c / n` and `Σ_w = (G − Σ_c n_c μ_c μ_cᵀ) / n`:

    w_c = (Σ_w + λI)⁻¹ (μ_c − m)        b_c = −½ w_cᵀ (μ_c + m) + log(n_c / n)

are the log posteriors, up to a term that all classes share, of Gaussian classes with one covariance. With μ_c in the
place of μ_c − m that term would be `mᵀ (Σ_w + λI)⁻¹ x`, which is large enough to drown the classes in float32 where
features vary little around their mean. λ is chosen by
generalized cross-validation (Golub, Heath, Wahba, 1979) of the ridge regression of one-hot targets, which has the same
discriminant directions (Hastie, Tibshirani, Buja, 1994) and whose score is a function of the same sums:

    GCV(λ) = RSS(λ) / (1 − df(λ) / n)²,    df(λ) = 1 + Σ_k e_k / (e_k + λ),    e: eigenvalues of the total covariance.

Where an example may have several classes, or none, each class is told from the examples that are not of it: with
p = n_c / n, μ_c and μ̄_c the means of the two, δ = μ_c − μ̄_c and `Σ_c = (G − Σx Σxᵀ / n) / n − p (1 − p) δ δᵀ`,

    w_c = (Σ_c + λI)⁻¹ δ        b_c = −½ w_cᵀ (μ_c + μ̄_c) + log(p / (1 − p))

are the log odds. The ridge regression's targets are then 0 and 1 for each class, and the score is the same.

Of a number y, with the covariance S of the features, s of features and number, and the means m and ȳ,

    w = (S + λI)⁻¹ s        b = ȳ − wᵀm

is the ridge regression itself (Hoerl, Kennard, 1970), its constant not penalized, and λ has its score.

Only λ with df(λ) ≤ n / 2 are tried. With fewer examples than features the score has a second minimum where every
example is fitted, at the smallest λ, as soon as some of them are there twice: each then stands for the other that is
left out.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bora_fl.heads.sums import ClassSums

# Logit of a class without examples: below any other, and finite in float16.
MISSING = -1e4
# Candidate scales of the logits, from the solved one down.
SCALES = (1.0, 0.84, 0.71, 0.59, 0.5, 0.42, 0.35, 0.3, 0.25)
# λ over the mean eigenvalue of the total covariance; 100 is enough for fewer examples than a tenth of the features.
_GRID = torch.logspace(-4, 2, 31, dtype=torch.float64)


@dataclass(frozen=True)
class Head:
    """A linear layer: ``logits = x weightᵀ + bias``.

    Attributes:
        weight: ``[C, d]`` float64.
        bias: ``[C]`` float64, or None.
    """

    weight: Tensor
    bias: Tensor | None

    def is_finite(self) -> bool:
        """Whether float32 holds every number of it."""
        parts = [self.weight] if self.bias is None else [self.weight, self.bias]
        return all(bool(part.float().isfinite().all()) for part in parts)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``[N, C]`` of features ``[N, d]``."""
        logits = x.to(self.weight) @ self.weight.T
        return logits if self.bias is None else logits + self.bias


def lda(sums: ClassSums, penalty: float | None = None, *, bias: bool = True) -> Head:
    """Solve the head.

    Args:
        sums: Over all examples.
        penalty: λ, in the units of the features' variance; left out, `gcv_penalty`'s.
        bias: False for a layer without bias: each class's constant is then carried by the linear function of the
            features that is closest to 1 on the examples, ``vᵀx`` with ``v = (G / n + λI)⁻¹ x̄``.

    Returns:
        The head. A class without examples has weight 0 and a logit of -10,000; where examples may have several classes,
        one that all of them have has 10,000.

    Raises:
        ValueError: If there are no examples, or `penalty` is not above 0.
    """
    n = _examples(sums)
    penalty = gcv_penalty(sums) if penalty is None else _above_0(penalty)
    common = sums.total / n
    if sums.several:
        weight, constant = _each(sums, penalty)
    else:
        present = sums.counts > 0
        means = sums.sums / sums.counts.clamp(min=1e-300)[:, None]
        weight = _solve(sums.within_scatter() / n, penalty, torch.where(present[:, None], means - common, 0.0))
        constant = -0.5 * (weight * (means + common)).sum(1) + (sums.counts / n).clamp(min=1e-300).log()
        constant[~present] = MISSING
    if bias:
        return Head(weight, constant)
    one = _solve(sums.gram / n, penalty, common[None])[0]
    return Head(weight + constant[:, None] * one, None)


def ridge(sums: ClassSums, penalty: float | None = None, *, bias: bool = True) -> Head:
    """Solve the head that predicts a number.

    Args:
        sums: Over all examples, with the number as the last feature.
        penalty: λ, in the units of the features' variance; left out, by generalized cross-validation.
        bias: False for a layer without bias: with means of products in the place of covariances.

    Returns:
        The head ``[1, d]``.

    Raises:
        ValueError: If there are no examples, or `penalty` is not above 0.
    """
    n = _examples(sums)
    mean = sums.total / n
    second = sums.gram / n
    both = second - torch.outer(mean, mean) if bias else second
    within, cross = both[:-1, :-1], both[-1:, :-1]
    penalty = _gcv(within, cross, float(both[-1, -1]), n) if penalty is None else _above_0(penalty)
    weight = _solve(within, penalty, cross)
    return Head(weight, mean[-1:] - weight @ mean[:-1] if bias else None)


def _each(sums: ClassSums, penalty: float) -> tuple[Tensor, Tensor]:
    """Each class against the examples that are not of it, by the covariance within these two."""
    n, (counts, class_sums) = sums.examples, sums.of_classes()
    mean, share = sums.total / n, counts / n
    both = (counts > 0) & (counts < n)
    here = class_sums / counts.clamp(min=1)[:, None]
    elsewhere = (sums.total - class_sums) / (n - counts).clamp(min=1)[:, None]
    apart = torch.where(both[:, None], here - elsewhere, 0.0)
    directions = _solve(sums.gram / n - torch.outer(mean, mean), penalty, apart)
    # Σ_c is the total covariance less p (1 − p) δ δᵀ: Sherman and Morrison's formula takes that out of its inverse.
    spread = share * (1 - share) * (directions * apart).sum(1)
    weight = directions / (1 - spread).clamp(min=1e-12)[:, None]
    constant = -0.5 * (weight * (here + elsewhere)).sum(1) + share.clamp(1e-300, 1.0).log() - (1 - share).log()
    return weight, torch.where(both, constant, torch.where(counts > 0, -MISSING, MISSING).to(constant))


def gcv_penalty(sums: ClassSums) -> float:
    """λ by generalized cross-validation, from the sums alone.

    Raises:
        ValueError: If there are no examples.
    """
    n = _examples(sums)
    counts, class_sums = sums.of_classes()
    mean, share = sums.total / n, counts / n
    cross = class_sums / n - torch.outer(share, mean)
    return _gcv(sums.gram / n - torch.outer(mean, mean), cross, float((share - share.square()).sum()), n)


def _gcv(covariance: Tensor, cross: Tensor, variance: float, n: float) -> float:
    """λ from the covariance of the features ``[d, d]``, that of targets and features ``[C, d]``, and the targets'."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0)
    scale = max(float(values.mean()), 1e-12)
    cross = cross @ vectors
    scores = []
    for penalty in (_GRID * scale).tolist():
        weight = cross / (values + penalty)
        residual = variance - float((2 * weight * cross - values * weight.square()).sum())
        freedom = 1 + float((values / (values + penalty)).sum())
        scores.append(residual / (1 - freedom / n) ** 2 if freedom <= n / 2 else math.inf)
    best = min(range(len(scores)), key=scores.__getitem__)
    return float(_GRID[best if math.isfinite(scores[best]) else -1]) * scale


def scaled(head: Head, scales: tuple[float, ...] = SCALES) -> dict[str, Head]:
    """The head with its logits scaled, by name, for `choose`: the classes that win stay, the loss does not.

    Features with heavier tails than a Gaussian make discriminant analysis overconfident, and training from such a head
    begins at a needlessly large loss.
    """
    return {
        f"x{scale:g}": Head(head.weight * scale, None if head.bias is None else head.bias * scale) for scale in scales
    }


def interpolate(first: Head, second: Head, share: float) -> Head:
    """``(1 − share) · first + share · second``."""
    bias = None
    if first.bias is not None and second.bias is not None:
        bias = torch.lerp(first.bias, second.bias, share)
    return Head(torch.lerp(first.weight, second.weight, share), bias)


def choose(heads: Mapping[str, Head], loss: Callable[[str, Head], float]) -> tuple[str, Head]:
    """The head of the smallest loss; of equal ones the first.

    Args:
        heads: Name to head, in order of preference.
        loss: Held-out loss of a named head; one that is not finite never wins over one that is.

    Raises:
        ValueError: If there is no head.
    """
    if not heads:
        raise ValueError("there is no head to choose from")
    losses = {name: loss(name, head) for name, head in heads.items()}
    name = min(losses, key=lambda n: losses[n] if math.isfinite(losses[n]) else math.inf)
    return name, heads[name]


def _examples(sums: ClassSums) -> float:
    if not sums.examples > 0:
        raise ValueError("a head is solved from at least one example")
    return sums.examples


def _above_0(penalty: float) -> float:
    if not penalty > 0:
        raise ValueError(f"penalty = {penalty}: it is above 0")
    return penalty


def _solve(matrix: Tensor, penalty: float, rows: Tensor) -> Tensor:
    """``rows (matrix + λI)⁻¹``."""
    shifted = matrix + penalty * torch.eye(len(matrix), dtype=matrix.dtype)
    solved: Tensor = torch.linalg.solve(shifted, rows.T).T
    return solved
