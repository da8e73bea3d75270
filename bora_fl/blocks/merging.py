"""The mean of products, exactly, and the product of means, for comparison and as a starting point.

Clients k with weights w_k return `(B^k, Sigma^k, A^k)`. The true merged update is the mean of their products,

    M[i, j] = Σ_k w_k B_i^k diag(Sigma^k[i, j]) A_j^k,

and concatenating the factors along the rank, with the weights inside Sigma, *is* that update: one set of block factors
of rank `Σ_k r_k`. Clients of different ranks need nothing special.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from bora_fl.blocks.factors import BlockFactors


def _check(factors: Sequence[BlockFactors], weights: Sequence[float]) -> None:
    if len(factors) == 0:
        raise ValueError("factors is empty; give at least one client's factors")
    if len(factors) != len(weights):
        raise ValueError(f"got {len(factors)} factors and {len(weights)} weights; give one weight for each")
    first = factors[0]
    for k, (f, weight) in enumerate(zip(factors, weights, strict=True)):
        if f.shape != first.shape or f.num_blocks != first.num_blocks:
            raise ValueError(
                f"factors[{k}] updates a {f.shape} weight in {f.num_blocks} blocks, factors[0] a {first.shape} one in"
                f" {first.num_blocks}; merge layers of one shape and convert the blocks first"
            )
        if not math.isfinite(weight):
            raise ValueError(f"weights[{k}] is {weight}; give a finite number")


def merge(factors: Sequence[BlockFactors], weights: Sequence[float]) -> BlockFactors:
    """Stack clients into one set of factors whose update is `Σ_k w_k delta_W^k`, exactly.

    Args:
        factors: One per client, of one shape and block count, of any ranks, scalings and dtypes.
        weights: One per client, used as they are: weights that sum to one give the mean. Negative ones subtract.

    Returns:
        Factors of rank `Σ_k r_k` with the first client's scaling.

    Raises:
        ValueError: If the clients' layers differ or a weight is missing or not finite.
    """
    _check(factors, weights)
    scaling = factors[0].scaling or 1.0
    sigma = [f.sigma * (float(w) * f.scaling / scaling) for f, w in zip(factors, weights, strict=True)]
    return BlockFactors(
        torch.cat([f.B for f in factors], dim=1),
        torch.cat(sigma, dim=2),
        torch.cat([f.A for f in factors], dim=0),
        scaling,
    )


def factor_mean(factors: Sequence[BlockFactors], weights: Sequence[float]) -> BlockFactors:
    """Average B, (effective) Sigma and A separately: the product of the means, FedIT's merge.

    It is not the mean of the products, but a good start for `refactorize`. Smaller clients are padded with zeros in
    B and A (as HetLoRA does), and their Sigma is left out of the mean where they have no component. Weights are
    normalized to sum to one. Scalings are averaged into B.

    Args:
        factors: One per client, of one shape and block count.
        weights: One non-negative number per client, not all zero.

    Returns:
        Factors of the largest client's rank with the first client's scaling, in the first client's dtype.

    Raises:
        ValueError: If the clients' layers differ, or the weights are negative or sum to zero.
    """
    _check(factors, weights)
    total = math.fsum(weights)
    if total <= 0 or min(weights) < 0:
        raise ValueError(f"weights are {list(weights)}; give non-negative weights that are not all zero")
    first = factors[0]
    rank = max(f.rank for f in factors)
    scaling = first.scaling or 1.0
    B = torch.zeros(first.shape[0], rank, dtype=torch.float64, device=first.B.device)
    A = torch.zeros(rank, first.shape[1], dtype=torch.float64, device=first.A.device)
    sigma = torch.zeros(first.num_blocks, first.num_blocks, rank, dtype=torch.float64, device=first.sigma.device)
    present = torch.zeros(rank, dtype=torch.float64, device=first.sigma.device)
    for f, w in zip(factors, weights, strict=True):
        share = float(w) / total
        B[:, : f.rank].add_(f.B, alpha=share * f.scaling / scaling)  # in float64, without a copy
        A[: f.rank].add_(f.A, alpha=share)
        sigma[..., : f.rank].add_(f.sigma, alpha=share)
        present[: f.rank] += share
    sigma = torch.where(present > 0, sigma / present.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
    dtype = first.B.dtype
    return BlockFactors(B.to(dtype), sigma.to(dtype), A.to(dtype), scaling)
