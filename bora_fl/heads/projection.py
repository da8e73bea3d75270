"""Wide features on fewer directions: a Gram matrix of d (d + 1) / 2 numbers is 34 MB at d = 4096.

The coordinates are dealt at random to k groups of nearly equal size, and a group becomes one: the sum of its
coordinates, each with a random sign, over the square root of how many they are. That is ``x P`` with orthonormal
columns, a balanced count sketch (Charikar, Chen, Farach-Colton, 2002); a head ``W`` on it is the head ``W Pᵀ`` on the
features. P is the same everywhere and in every run.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from bora_fl.heads.solve import Head

_SEED = 20_260_101


@lru_cache(maxsize=4)
def _deal(dim: int, width: int) -> tuple[Tensor, Tensor]:
    """The group of each coordinate ``[d]`` int64, and its entry of P ``[d]`` float64."""
    random = np.random.RandomState(_SEED)  # whose stream no release of NumPy changes
    group = torch.from_numpy(random.permutation(dim)) % width
    sign = torch.from_numpy(random.randint(0, 2, dim) * 2.0 - 1.0)
    return group, sign / torch.bincount(group, minlength=width)[group].sqrt()


def narrow(features: Tensor, width: int) -> Tensor:
    """Features on at most `width` directions.

    Args:
        features: ``[N, d]``.
        width: k; 0 leaves them as they are, as does ``k ≥ d``.

    Returns:
        ``[N, min(k, d)]``, of norms no larger than the features'.
    """
    dim = features.shape[1]
    if not 0 < width < dim:
        return features
    group, entry = (part.to(features.device) for part in _deal(dim, width))
    found = features.new_zeros(len(features), width)
    return found.index_add_(1, group, features * entry.to(features.dtype))


def widen(head: Head, dim: int) -> Head:
    """The head on all features that is this head on narrowed ones.

    Args:
        head: Its weight is ``[C, k]``.
        dim: d, the width of the features.
    """
    width = head.weight.shape[1]
    if width == dim:
        return head
    group, entry = _deal(dim, width)
    return Head(head.weight[:, group] * entry, head.bias)


def narrowed(dim: int, width: int) -> int:
    """How wide features of width `dim` are when `narrow` is done with them."""
    return min(dim, width) if width else dim
