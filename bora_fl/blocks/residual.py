"""What a fit leaves of an update, in factored form and within a rank budget."""

from __future__ import annotations

import torch

from bora_fl.blocks.block_cores import BlockCores, add_up, compressed
from bora_fl.blocks.factors import BlockFactors
from bora_fl.blocks.merging import merge
from bora_fl.blocks.refactorization import refactorize
from bora_fl.blocks.svd import leading_svd


def residual(merged: BlockFactors | BlockCores, fit: BlockFactors, budget: int) -> BlockFactors:
    """The best approximation of `merged − fit` by block factors of rank at most `budget`.

    Starts from the truncated SVD of the residual, which is one set of block factors of that rank, and improves on it
    by least squares; so at equal rank it never leaves more than plain low-rank factors would.

    Args:
        merged: The update that was fitted.
        fit: Its fit, of the same shape and block count.
        budget: Rank of the result at most, at least 1; no more than the smaller side is used. With as much as
            `merged.rank + fit.rank` nothing is lost.

    Returns:
        Factors with `merged ≈ fit + residual` and scaling 1, in the dtype of `merged`.

    Raises:
        ValueError: If the budget is below 1.
    """
    if budget < 1:
        raise ValueError(f"budget is {budget}; give at least 1, or drop the residual")
    dtype = merged.B.dtype if isinstance(merged, BlockFactors) else merged.rows.dtype
    unit = BlockFactors(fit.B, fit.sigma * -fit.scaling, fit.A, 1.0)
    rest: BlockFactors | BlockCores
    if isinstance(merged, BlockFactors):
        rest = merge([unit.to(torch.float64), merged.to(torch.float64)], [1.0, 1.0])
        if rest.rank <= budget:
            return rest.to(dtype)
    else:
        rest = add_up([merged, unit])
    budget = min(budget, *fit.shape)  # no matrix has a higher rank, and components of nothing have no direction
    whole = compressed(rest)
    svd = leading_svd(whole.target, budget)
    B = whole.rows.expand(svd.left).reshape(-1, budget)
    A = whole.columns.expand(svd.right).permute(2, 0, 1).reshape(budget, -1)
    if merged.num_blocks == 1:
        return BlockFactors(B * svd.sigma[0, 0], B.new_ones(1, 1, budget), A).to(dtype)
    return refactorize(rest, budget, start=BlockFactors(B, svd.sigma, A)).factors.to(dtype)
