"""From the trained `sigma` to the `Sigma` that multiplies, and back.

`"exp_norm"`: `Sigma = exp(sigma / mean|sigma|)`, the mean over the whole tensor (BoRA, arXiv:2508.06953). It does not
change when sigma is scaled, so only the direction of sigma can be read back from Sigma.
`"identity"`: `Sigma = sigma`.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from bora_fl.kernels.reference import exp_norm

SigmaTransform = Literal["exp_norm", "identity"]
SigmaInit = Literal["auto", "ones", "diverse"]
SIGMA_TRANSFORMS: tuple[str, ...] = get_args(SigmaTransform)
SIGMA_INITS: tuple[str, ...] = get_args(SigmaInit)

# How far mean|log Sigma| may be from 1 for Sigma to count as a value of exp_norm. Wide enough for a Sigma that
# travelled in half precision, far too narrow for an average of several Sigmas.
_RANGE_TOLERANCE = 1e-3


def to_effective(sigma: Tensor, transform: str) -> Tensor:
    """Return the Sigma that multiplies.

    Args:
        sigma: The trained parameter, `[b, b, r]`, any floating dtype.
        transform: `"exp_norm"` or `"identity"`.

    Returns:
        Sigma `[b, b, r]`, differentiable in sigma. For `"identity"` it is sigma itself.

    Raises:
        ValueError: The transform is unknown.
    """
    if transform == "exp_norm":
        return exp_norm(sigma)
    if transform == "identity":
        return sigma
    raise ValueError(f"sigma_transform={transform!r} is unknown; use one of {', '.join(SIGMA_TRANSFORMS)}.")


def to_raw(Sigma: Tensor, transform: str) -> Tensor:
    """Return a sigma whose transform is Sigma.

    For `"exp_norm"` every positive multiple of `log Sigma` would do. The multiple chosen has the mean magnitude of a
    freshly initialized sigma, `1 / (2 sqrt(b r))`, so that a step of a given size turns sigma by the same angle in
    every round.

    Args:
        Sigma: Effective values, `[b, b, r]`, any floating dtype.
        transform: `"exp_norm"` or `"identity"`.

    Returns:
        sigma `[b, b, r]`, of Sigma's dtype, detached, in memory of its own.

    Raises:
        ValueError: The transform is unknown, or Sigma is not in the range of `exp_norm`: positive, mean|log Sigma| = 1.
    """
    Sigma = Sigma.detach()
    if transform == "identity":
        return Sigma.clone()
    if transform != "exp_norm":
        raise ValueError(f"sigma_transform={transform!r} is unknown; use one of {', '.join(SIGMA_TRANSFORMS)}.")
    wide = Sigma.to(torch.float64)
    if not bool((wide > 0).all()):
        raise ValueError(
            f"Sigma has values that are not positive (smallest {wide.min().item():.3g}), which exp_norm cannot reach; "
            "bring the factors to the exp_norm gauge first, or train with sigma_transform='identity'."
        )
    log_sigma = wide.log()
    mean_magnitude = log_sigma.abs().mean().item()
    if abs(mean_magnitude - 1.0) > _RANGE_TOLERANCE:
        raise ValueError(
            f"mean|log Sigma| is {mean_magnitude:.6g} where exp_norm always gives 1; bring the factors to the exp_norm "
            "gauge first, or train with sigma_transform='identity'."
        )
    num_blocks, _, rank = Sigma.shape
    scale = 1.0 / (2.0 * math.sqrt(num_blocks * rank) * mean_magnitude)
    return (scale * log_sigma).to(Sigma.dtype)


@torch.no_grad()
def init_sigma_(sigma: Tensor, transform: str, init: str = "auto") -> Tensor:
    """Fill sigma in place with its starting value.

    Under `"exp_norm"` sigma is Kaiming-uniform like A, so that log Sigma is close to uniform on (-2, 2). Under
    `"identity"`, `"diverse"` starts Sigma with that same distribution and `"ones"` starts every block pair alike;
    `"auto"` is `"ones"` for one block and `"diverse"` for more.

    Args:
        sigma: The parameter, `[b, b, r]`.
        transform: `"exp_norm"` or `"identity"`.
        init: `"auto"`, `"ones"` (only with `"identity"`) or `"diverse"`.

    Returns:
        sigma.
    """
    if transform == "identity" and (init == "ones" or (init == "auto" and sigma.shape[0] == 1)):
        return nn.init.ones_(sigma)
    nn.init.kaiming_uniform_(sigma, a=math.sqrt(5))
    if transform == "identity":
        sigma.copy_(exp_norm(sigma))
    return sigma
