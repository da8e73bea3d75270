"""The closed-form head under record-level differential privacy: one Gaussian release for each client.

A record's feature vector is clipped to a norm of C and divided by it, and the record adds

    (e_y, x, T(x xᵀ)),    T: the upper triangle, off-diagonal entries times √2,
    |e_y| = 1,  |x| ≤ 1,  |T(x xᵀ)| = |x|² ≤ 1

to the client's sums. Noise of standard deviations σ/√f_1, σ/√f_2, σ/√f_3 with f_1 + f_2 + f_3 = 1 on the three parts
is, after scaling each by √f_i, the Gaussian mechanism with noise multiplier σ on a vector of norm at most 1: adding or
removing a record is hidden as by one step at sample rate 1, `Spent(σ, 1.0, 1)`. Where a number is to be predicted,
it is clipped to a range that is known beforehand, brought to [-1, 1], and one coordinate more: (x, y) / √2 is in the
place of x.

Solving repairs what the noise did, from what everybody knows of it: counts are floored, class means shrink towards the
common mean (James and Stein, 1961), negative eigenvalues of Σ_w are set to 0, and λ is half the noise's spectral norm.
"""

import math
import statistics
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from bora_fl.config import Settings
from bora_fl.data import Encoded
from bora_fl.heads.features import features
from bora_fl.heads.projection import narrow
from bora_fl.heads.solve import Head
from bora_fl.heads.sums import ClassSums
from bora_fl.privacy.accounting import solve_noise
from bora_fl.privacy.gaussian import Randomness, SystemRandomness, add_noise

# Shares of the budget of counts, sums and Gram matrix: where there are classes, and where there is a number, which the
# Gram matrix tells of.
SHARES = (0.1, 0.6, 0.3)
NUMBER_SHARES = (0.05, 0.15, 0.8)
# λ over the spectral norm of the noise on Σ_w, or on the covariance.
PENALTY, NUMBER_PENALTY = 0.5, 0.35
# Standard deviations of the noise beyond which a release is none.
_FAR = 6.0
# Times the median client's examples that one client's release counts for at most.
_HEAVIEST = 10.0
# Quantile of the norms of public texts' features that C is.
_QUANTILE = 0.95


def release(
    sums: ClassSums, noise_multiplier: float, randomness: Randomness | None = None, *, number: bool = False
) -> ClassSums:
    """Noise one client's sums before they leave.

    Args:
        sums: Of features that `collect` has clipped and scaled (its `clip_norm`) to a norm of at most 1.
        noise_multiplier: σ, such as ``solve_noise(epsilon, delta, 1.0, 1)``.
        randomness: Left out, the operating system's.
        number: Whether the last feature is the number to be predicted.

    Returns:
        The noised sums; whatever is computed from them is as private.
    """
    randomness = randomness or SystemRandomness()
    counts, sums_std, gram_std = noise_stds(noise_multiplier, number=number)
    rows, columns = torch.triu_indices(*sums.gram.shape)
    weight = torch.where(rows == columns, 1.0, math.sqrt(2.0)).double()
    triangle = add_noise(sums.gram[rows, columns] * weight, gram_std, randomness) / weight
    gram = torch.empty_like(sums.gram)
    gram[rows, columns] = gram[columns, rows] = triangle
    return ClassSums(add_noise(sums.counts, counts, randomness), add_noise(sums.sums, sums_std, randomness), gram)


def release_noise(settings: Settings) -> float:
    """σ of a client's release of sums under ``privacy.mode = record``: one step that spends the head's share of ε."""
    privacy = settings.privacy
    share = settings.head.budget_share if settings.run.num_rounds else 1.0
    return solve_noise(share * privacy.epsilon, privacy.delta, 1.0, 1, privacy.accountant)


def noise_stds(noise_multiplier: float, clients: int = 1, *, number: bool = False) -> tuple[float, float, float]:
    """Standard deviations of the noise on counts, sums and the triangle, in the sum of several clients' releases."""
    stds = [noise_multiplier * math.sqrt(clients / share) for share in (NUMBER_SHARES if number else SHARES)]
    return stds[0], stds[1], stds[2]


def check_release(sums: ClassSums, noise_multiplier: float, *, number: bool = False) -> None:
    """Check that some examples, with features of a norm of at most 1, can have these noised sums.

    No count is below 0, no class's sum is longer than the class's count, and the eigenvalues of the Gram matrix lie
    between 0 and the number of examples: each up to 6 standard deviations of the noise, which an honest client exceeds
    with a probability of about 1e-9 an entry.

    Args:
        sums: A client's release.
        noise_multiplier: σ of it.
        number: As in `release`.

    Raises:
        ValueError: If none can.
    """
    counts_std, sums_std, gram_std = noise_stds(noise_multiplier, number=number)
    classes, dim = sums.sums.shape
    if float(sums.counts.min()) < -_FAR * counts_std:
        raise ValueError("the head's noised counts are further below 0 than the noise reaches")
    longest = sums.counts.clamp(min=0) + _FAR * counts_std + (math.sqrt(dim) + _FAR) * sums_std
    if bool((sums.sums.norm(dim=1) > longest).any()):
        raise ValueError("the head's noised sums are longer than as many examples' features can be")
    reach = _spectral_norm(gram_std, dim) + _FAR * gram_std
    most = float(sums.counts.sum()) + _FAR * math.sqrt(classes) * counts_std + reach
    eigenvalues = torch.linalg.eigvalsh(sums.gram)
    if not (float(eigenvalues[0]) >= -reach and float(eigenvalues[-1]) <= most):  # nor NaN
        raise ValueError("the head's noised Gram matrix is that of no such examples")


def most_weight(
    examples: Collection[float], num_classes: int, noise_multiplier: float, *, number: bool = False
) -> float:
    """What one client's release counts for at most: ten times the median client's examples.

    A larger one is scaled down to it, so that a client which lies about its counts moves the head no further than one
    with so many examples can, and a large honest one is not lost. It is post-processing, and costs no privacy.

    Args:
        examples: Of each release that passes `check_release`, as its noised counts have it.
        num_classes: C.
        noise_multiplier: σ; a median below the noise of a total counts as that.
        number: As in `release`.
    """
    floor = math.sqrt(num_classes) * noise_stds(noise_multiplier, number=number)[0]
    return _HEAVIEST * max(statistics.median_low(examples) if examples else 0.0, floor)


def solve_private(
    sums: ClassSums, noise_multiplier: float, clients: int, clip_norm: float, *, bias: bool = True
) -> Head:
    """Solve the head from the sum of the clients' releases.

    Args:
        sums: The sum of `clients` releases, each with `noise_multiplier`.
        noise_multiplier: σ.
        clients: How many.
        clip_norm: C; the head is for the features as they are, before clipping.
        bias: False for a layer without bias, as in `lda`.

    Raises:
        ValueError: If the noise is 0; `lda` solves from sums without noise.
    """
    _require_noise(noise_multiplier)
    counts_std, sums_std, gram_std = noise_stds(noise_multiplier, clients)
    dim = sums.gram.shape[0]
    counts = sums.counts.clamp(min=max(counts_std, 1.0))
    n = float(counts.sum())
    common = sums.sums.sum(0) / n
    apart = sums.sums - counts[:, None] * common
    kept = (1 - dim * sums_std**2 / apart.square().sum(1).clamp(min=1e-300)).clamp(min=0)
    means = common + kept[:, None] * apart / counts[:, None]
    penalty = PENALTY * _spectral_norm(gram_std, dim) / n
    weight = _solve((sums.gram - (means * counts[:, None]).T @ means) / n, penalty, means - common)
    constant = -0.5 * (weight * (means + common)).sum(1) + (counts / n).log()
    if bias:
        return Head(weight / clip_norm, constant)
    one = _solve(sums.gram / n, penalty, common[None])
    return Head((weight + constant[:, None] * one) / clip_norm, None)


def solve_private_number(
    sums: ClassSums,
    noise_multiplier: float,
    clients: int,
    clip_norm: float,
    number_range: tuple[float, float],
    *,
    bias: bool = True,
) -> Head:
    """Solve the head that predicts a number, as `bora_fl.heads.ridge` does, from the sum of the clients' releases.

    Args:
        sums: As in `solve_private`, with the number as the last feature.
        noise_multiplier: σ.
        clients: How many.
        clip_norm: C; the head is for the features as they are, before clipping.
        number_range: Low and high that the numbers were clipped to.
        bias: False for a layer without bias, as in `ridge`.

    Raises:
        ValueError: If the noise is 0.
    """
    _require_noise(noise_multiplier)
    counts_std, _, gram_std = noise_stds(noise_multiplier, clients, number=True)
    n = max(float(sums.counts[0]), counts_std, 1.0)
    mean, second = sums.sums[0] / n, sums.gram / n
    covariance = second - torch.outer(mean, mean)
    penalty = NUMBER_PENALTY * _spectral_norm(gram_std, len(mean)) / n
    middle, half = sum(number_range) / 2, math.sqrt(2) * (number_range[1] - number_range[0]) / 2
    if not bias:
        products = middle * mean[None, :-1] + half * second[-1:, :-1]
        return Head(_solve(second[:-1, :-1], penalty, products) / (math.sqrt(2) * clip_norm), None)
    weight = half * _solve(covariance[:-1, :-1], penalty, covariance[-1:, :-1])
    return Head(weight / (math.sqrt(2) * clip_norm), middle + half * mean[-1:] - weight @ mean[:-1])


def _require_noise(noise_multiplier: float) -> None:
    if not noise_multiplier > 0:
        raise ValueError(
            f"noise_multiplier = {noise_multiplier}: it is above 0; lda and ridge solve sums without noise"
        )


def _spectral_norm(gram_std: float, dim: int) -> float:
    """That of a symmetric matrix of noise: off-diagonal entries have gram_std / √2, and it is 2 √d times that."""
    return math.sqrt(2 * dim) * gram_std


def _solve(matrix: Tensor, penalty: float, rows: Tensor) -> Tensor:
    """``rows (matrix + λI)⁻¹``, with the matrix's negative eigenvalues, which are the noise's, set to 0."""
    values, vectors = torch.linalg.eigh(matrix)
    solved: Tensor = rows @ (vectors / (values.clamp(min=0) + penalty)) @ vectors.T
    return solved


def public_clip_norm(model: nn.Module, tokenizer: Any, num_classes: int, max_length: int, width: int = 0) -> float:
    """C from public text alone: a high quantile of the norms of the features of sentences of Python's documentation.

    Args:
        model: The model whose head is to be solved.
        tokenizer: Its tokenizer.
        num_classes: C of the head.
        max_length: Tokens a text is cut at.
        width: As in `collect`.
    """
    return typical_norm(narrow(public_features(model, tokenizer, num_classes, max_length), width))


def public_features(model: nn.Module, tokenizer: Any, num_classes: int, max_length: int) -> torch.Tensor:
    """Features ``[N, d]`` float64 of those sentences."""
    return torch.cat([x for x, _ in features(model, _public(tokenizer, max_length), 64, num_classes)])


def typical_norm(features: torch.Tensor) -> float:
    """C: a high quantile of the norms of features ``[N, k]`` of public text."""
    return float(features.norm(dim=1).quantile(_QUANTILE))


def _public(tokenizer: Any, max_length: int) -> Encoded:
    """256 sentences of the language reference that comes with Python."""
    from pydoc_data.topics import topics

    import numpy as np

    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    sentences = [part for part in text.split(". ") if 30 < len(part) < 200][:256]
    ids = [tokenizer(s, truncation=True, max_length=max_length, verbose=False)["input_ids"] for s in sentences]
    lengths = np.array([len(i) for i in ids], dtype=np.int64)
    return Encoded(
        tokens=np.concatenate(ids).astype(np.int32),
        begin=np.cumsum(lengths) - lengths,
        lengths=lengths,
        prompts=np.zeros_like(lengths),
        classes=np.zeros_like(lengths),
        pad_id=tokenizer.pad_token_id or 0,
        max_length=max_length,
    )
