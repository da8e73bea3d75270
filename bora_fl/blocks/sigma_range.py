"""Which Sigma the gauge can bring into the range of `exp_norm`, and how.

`exp_norm` reaches exactly the positive tensors with `mean|log Sigma| = 1`. With `L = log Sigma`, the gauge adds row and
column shifts, `L[i,j,k] + a[i,k] + c[j,k]`. `mean|L + a + c|` is convex in the shifts and unbounded above, so it takes
the value one if and only if its minimum (the L1 distance of L from the sums of a row and a column part) is at most one.
That always holds for one block, whose minimum is zero, and for a constant Sigma. It fails when blocks differ by too
much, in the extreme when an entry of Sigma is zero. The remedy that costs least is a floor under Sigma, measured while
the components have unit columns, so that an entry is the norm of what it contributes: raising the smallest entries
first, there is always a floor for which the minimum is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_BISECTIONS = 60


def interaction(
    log_sigma: Tensor, alive: Tensor, columns: bool = True, sweeps: int = 20, enough: float = 0.0
) -> Tensor:
    """What is left of `log Sigma [b, b, r]` after the row (and column) shifts that nearly minimize `mean|·|`.

    Median polish, started from the least-squares shifts; entries that are not alive (their component vanishes in that
    block row or column, so that Sigma means nothing) come back as zero.

    Args:
        log_sigma: `[b, b, r]`, finite.
        alive: `[b, b, r]`, bool.
        columns: Whether column shifts are free too.
        sweeps: Passes at most.
        enough: Stop as soon as the mean magnitude is not above this.
    """
    kept = torch.where(alive, log_sigma, torch.nan)
    if columns:
        for _ in range(3):
            kept = kept - kept.nanmean(1, keepdim=True).nan_to_num()
            kept = kept - kept.nanmean(0, keepdim=True).nan_to_num()
    best, best_size = kept.nan_to_num(), float(kept.abs().nansum())
    for _ in range(sweeps):
        if best_size <= enough * kept.numel():
            break
        kept = kept - _median(kept, 1)
        if columns:
            kept = kept - _median(kept, 0)
        size = float(kept.abs().nansum())
        if not size < best_size * (1 - 1e-6):
            break
        best, best_size = kept.nan_to_num(), size
    return best


def _median(values: Tensor, dim: int) -> Tensor:
    """Midpoint median along a dimension, ignoring NaN; zero where nothing is left."""
    low = values.nanmedian(dim, keepdim=True).values
    high = -(-values).nanmedian(dim, keepdim=True).values
    return ((low + high) / 2).nan_to_num()


def spread(sigma: Tensor, alive: Tensor) -> float:
    """The least `mean|log Sigma|` the gauge can reach, or any value it can reach that is at most one."""
    return float(interaction(sigma.log(), alive, enough=1.0).abs().mean())


def least_floor(sigma: Tensor, alive: Tensor) -> float:
    """The least floor under a positive or non-negative Sigma for which the gauge can bring it into range.

    Args:
        sigma: `[b, b, r]`, with unit columns in the factors.
        alive: `[b, b, r]`, bool.

    Returns:
        Zero if Sigma is positive and in reach as it is.
    """
    top = float(sigma[alive].max()) if bool(alive.any()) else 0.0
    if top <= 0 or (bool((sigma[alive] > 0).all()) and spread(sigma.clamp_min(top * 1e-300), alive) <= 1):
        return 0.0
    low, high = -100.0, 0.0  # natural logarithms of the floor relative to the largest entry
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if spread(sigma.clamp_min(top * math.exp(middle)), alive) <= 1:
            high = middle
        else:
            low = middle
        if high - low < 1e-6:
            break
    return float(top * math.exp(high))


def into_range(log_sigma: Tensor, alive: Tensor, columns: bool = True) -> Tensor:
    """Shift `log Sigma` by rows and columns so that `mean|log Sigma| = 1`, moving it as little as that takes.

    If the mean is below one, one common shift upward; if it is above, the part that rows and columns explain is shrunk.
    Both have a unique solution, by convexity.

    Args:
        log_sigma: `[b, b, r]`, in the gauge one would like.
        alive: `[b, b, r]`, bool; other entries are set to zero before the common shift.
        columns: Whether column shifts are free.

    Returns:
        The shifted logarithms.

    Raises:
        ValueError: If no shift reaches the range.
    """
    wanted = torch.where(alive, log_sigma, 0.0)
    if float(wanted.abs().mean()) < 1:
        return wanted + _root(lambda t: float((wanted + t).abs().mean()), 2.0)
    core = interaction(wanted, alive, columns)
    reach = float(core.abs().mean())
    if reach > 1 + 1e-9:
        raise ValueError(
            f"Sigma is too far from a product of row and column factors for exp_norm: mean|log Sigma| cannot be brought"
            f" below {reach:.3g}, it must be 1; refactorize with sigma_transform='exp_norm'"
        )
    rest = wanted - core
    return core + rest * _root(lambda t: float((core + rest * t).abs().mean()), 1.0)


def _root(increasing: Callable[[float], float], high: float) -> float:
    """Where a convex function that starts at most at one reaches one, between 0 and `high`."""
    low = 0.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if increasing(middle) < 1:
            low = middle
        else:
            high = middle
    return (low + high) / 2
