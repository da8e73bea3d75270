"""The one entry to the fused layer: `bora_linear` picks a path by device, dtype and shape."""

import torch
from torch import Tensor
from torch.nn import functional

from bora_fl.kernels.dropout import draw_seed
from bora_fl.kernels.reference import bora_branch_reference


def bora_linear(
    x: Tensor,
    A: Tensor,
    Sigma: Tensor,
    B: Tensor,
    scaling: float,
    *,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return a BoRA layer's output, or its branch alone.

    Args:
        x: `[..., n]`.
        A: `[r, n]`.
        Sigma: `[b, b, r]`, effective; b divides n and m.
        B: `[m, r]`.
        scaling: factor of the whole update.
        base_weight: frozen `[m, n]`; with it the result is the base layer's output plus the branch.
        base_bias: `[m]`.
        dropout_p: probability of dropping an element of x before A; the caller passes 0 outside training.
        seed: `[]`, int64, on x's device; drawn from torch's default generator when None.

    Returns:
        y `[..., m]`, in x's dtype (under autocast: the dtype autocast gives `F.linear`).
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        x, A, B = x.to(low), A.to(low), B.to(low)
        base_weight, base_bias = (None if t is None else t.to(low) for t in (base_weight, base_bias))
    if dropout_p > 0 and seed is None:
        seed = draw_seed(x.device)
    with torch.autocast(device, enabled=False):
        y = bora_branch_reference(x, A, Sigma, B, scaling, dropout_p=dropout_p, seed=seed)
        return y if base_weight is None else functional.linear(x, base_weight, base_bias) + y
