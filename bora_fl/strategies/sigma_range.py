"""Bring averaged factors back into the range of their Sigma's transform without changing their update.

`exp_norm` reaches exactly the positive Sigma with `mean|log Sigma| = 1`. The mean of several such Sigmas is positive,
but its mean|log| is off. The update does not change under `B_i[:, k] · α_ik`, `A_j[k, :] · β_jk`, `Sigma[i, j, k] /
(α_ik β_jk)`, so the part of log Sigma that is a sum of a row effect and a column effect is free: it is stretched or
shrunk by one factor until the mean|log| is 1, and the blocks' interaction, which is what Sigma is for, stays as it
is.
"""

from torch import Tensor

from bora_fl.blocks import BlockFactors, refactorize

_STEPS = 60  # bisections; the bracket shrinks below float64's resolution


def transpose(factors: BlockFactors) -> BlockFactors:
    """Factors of the transposed update: B and A exchange roles."""
    return BlockFactors(factors.A.T, factors.sigma.transpose(0, 1), factors.B.T, factors.scaling)


def restore_range(factors: BlockFactors, sigma_transform: str, *, keep_A: bool = False) -> BlockFactors:
    """The same update with a Sigma that the transform can reach.

    Args:
        factors: Any factors; under `exp_norm` with positive Sigma.
        sigma_transform: `"exp_norm"` or `"identity"`. Under the latter every Sigma is in range; one block is brought to
            plain LoRA's form, Sigma = 1, by moving Sigma into B.
        keep_A: Leave A as it is, so that only B takes what Sigma gives.

    Returns:
        Factors of the same update up to rounding. Where no rescaling can reach the range (the interaction alone has a
        mean|log| above 1, which takes clients that disagree wildly), the closest fit that can.

    Raises:
        ValueError: If Sigma is not positive under `exp_norm`.
    """
    if sigma_transform == "identity":
        return _plain(factors) if factors.num_blocks == 1 else factors
    sigma = factors.sigma.double()
    if not bool((sigma > 0).all()):
        raise ValueError(
            "Sigma has values that are not positive, which exp_norm cannot reach; use sigma_transform='identity'"
        )
    log = sigma.log()
    rows = log.mean(1, keepdim=True)
    columns = log.mean(0, keepdim=True) - rows.mean(0, keepdim=True)
    columns = columns * 0 if keep_A else columns
    stretch = _stretch(log, rows, columns)
    if stretch is None and keep_A:
        return restore_range(factors, sigma_transform)
    if stretch is None:
        return refactorize(factors, factors.rank, start=factors, sigma_transform="exp_norm").factors
    rows, columns = stretch[0] - rows, stretch[1] - columns
    b, r = factors.num_blocks, factors.rank
    B = factors.B.double().reshape(b, -1, r) * (-rows).exp()
    A = factors.A.double().reshape(r, b, -1) * (-columns).exp().permute(2, 1, 0)
    return BlockFactors(
        B.reshape(-1, r).to(factors.B.dtype),
        (log + rows + columns).exp().to(factors.sigma.dtype),
        A.reshape(r, -1).to(factors.A.dtype),
        factors.scaling,
    )


def _stretch(log: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor] | None:
    """New row and column effects that give `mean|log| = 1`, or None where there are none."""
    rest = log - rows - columns
    if float((rows + columns).abs().mean()) < 1e-6:  # nothing to stretch: shift B against Sigma instead
        rows = rows + 1.0

    def excess(factor: float) -> float:
        return float((rest + factor * (rows + columns)).abs().mean()) - 1.0

    if excess(1.0) > 0:
        low, high = 0.0, 1.0
        if excess(low) > 0:
            return None
    else:
        low, high = 1.0, 2.0
        while excess(high) < 0:
            low, high = high, 2 * high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return high * rows, high * columns


def _plain(factors: BlockFactors) -> BlockFactors:
    if bool((factors.sigma == 1).all()):
        return factors
    B = factors.B.double() * factors.sigma.double()[0, 0]
    return BlockFactors(B.to(factors.B.dtype), factors.sigma.new_ones(factors.sigma.shape), factors.A, factors.scaling)
