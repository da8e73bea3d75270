"""Bring averaged factors back into the range of their Sigma's transform without changing their update.

`exp_norm` reaches exactly the positive Sigma with `mean|log Sigma| = 1`. The mean of several such Sigmas is positive,
but its mean|log| is off. The update does not change under `B_i[:, k] · α_ik`, `A_j[k, :] · β_jk`,
`Sigma[i, j, k] / (α_ik β_jk)`, so Sigma is moved along this freedom as little as it takes
(`blocks.sigma_range.into_range`): by one common factor that B gives back or, where the mean is too large, by shrinking
what rows and columns explain. Order, signs and, where it can be, A stay as they are, so that what clients or the server
remember of the factors still fits them.
"""

import torch

from bora_fl.blocks import BlockFactors, refactorize
from bora_fl.blocks.sigma_range import into_range


def transpose(factors: BlockFactors) -> BlockFactors:
    """Factors of the transposed update: B and A exchange roles."""
    return BlockFactors(factors.A.T, factors.sigma.transpose(0, 1), factors.B.T, factors.scaling)


def restore_range(factors: BlockFactors, sigma_transform: str, *, keep_A: bool = False) -> BlockFactors:
    """The same update with a Sigma that the transform can reach.

    Args:
        factors: Any factors; under `exp_norm` with positive Sigma.
        sigma_transform: `"exp_norm"` or `"identity"`. Under the latter every Sigma is in range; one block is brought to
            plain LoRA's form, Sigma = 1, by moving Sigma into B.
        keep_A: Leave A as it is wherever B alone can take what Sigma gives.

    Returns:
        Factors of the same update up to rounding. Where no rescaling can reach the range (block pairs that differ by
        too much, which takes clients that disagree wildly), the closest fit that can.

    Raises:
        ValueError: If Sigma is not positive under `exp_norm`.
    """
    if sigma_transform == "identity":
        return _plain(factors) if factors.num_blocks == 1 else factors
    if not bool((factors.sigma > 0).all()):
        raise ValueError("Sigma has values that exp_norm cannot reach (not positive); use sigma_transform='identity'")
    log = factors.sigma.double().log()
    everywhere = torch.ones_like(log, dtype=torch.bool)
    for columns in (False, True) if keep_A else (True,):
        try:
            shifted = into_range(log, everywhere, columns)
        except ValueError:
            continue
        rows = (log - shifted).mean(1)
        shares = (log - shifted - rows[:, None]).mean(0)
        b, r = factors.num_blocks, factors.rank
        B = factors.B.double().reshape(b, -1, r) * rows.exp()[:, None]
        A = factors.A.double().reshape(r, b, -1) * shares.T.exp()[:, :, None] if columns else factors.A
        return BlockFactors(
            B.reshape(-1, r).to(factors.B.dtype),
            shifted.exp().to(factors.sigma.dtype),
            A.reshape(r, -1).to(factors.A.dtype),
            factors.scaling,
        )
    return refactorize(factors, factors.rank, start=factors, sigma_transform="exp_norm").factors


def _plain(factors: BlockFactors) -> BlockFactors:
    if bool((factors.sigma == 1).all()):
        return factors
    B = factors.B.double() * factors.sigma.double()[0, 0]
    return BlockFactors(B.to(factors.B.dtype), factors.sigma.new_ones(factors.sigma.shape), factors.A, factors.scaling)
