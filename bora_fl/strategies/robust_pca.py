"""A merge that scales up what few clients say: robust PCA of the clients' updates (FedRPCA, arXiv:2506.01194)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bora_fl.blocks import BlockFactors, factor_mean
from bora_fl.strategies.layer_merge import LayerMerge, LayerRound

_TOLERANCE = 1e-7  # of the split, relative
_GROWTH = 1.05  # of the penalty from step to step; at 1.2 it outruns the split
_MOST_STEPS = 1000


def fedrpca(layer: LayerRound) -> LayerMerge:
    """Average the low-rank part of the updates, and the sparse part times β.

    With the columns `w_k (vec X^k − vec X received)` for X = B, and for X = A: `[…] = L + S` by robust PCA and
    `X = X̄ + (β − 1) Σ_k S_k`, which is `X received + Σ_k L_k + β Σ_k S_k`. β is `strategy.sparse-scale`. What differs:
    weights enter the split, so that a client counts in it as it does in the mean; clients that agree up to rounding, or
    one alone, have no part of their own and are averaged. Sigma is averaged, since it would leave its range.
    """
    mean, extra = factor_mean(layer.updates, layer.weights), layer.settings.sparse_scale - 1
    parts = {}
    for name in ("B", "A"):
        ours, sent = [getattr(update, name).double() for update in layer.updates], getattr(layer.current, name)
        scaled = getattr(mean, name).double() + extra * _sparse_mean(ours, sent.double(), layer.weights, sent.dtype)
        parts[name] = scaled.to(sent.dtype)
    return LayerMerge(BlockFactors(parts["B"], mean.sigma, parts["A"], mean.scaling))


def _sparse_mean(updates: Sequence[Tensor], sent: Tensor, weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    """The sum over clients of the sparse part, in the factor's shape; `dtype` is what the updates travelled in."""
    spread = max(float((update - updates[0]).norm()) for update in updates)
    if spread <= 8 * torch.finfo(dtype).eps * float(updates[0].norm()):
        return torch.zeros_like(sent)
    columns = [weight * (update - sent).flatten() for update, weight in zip(updates, weights, strict=True)]
    return split(torch.stack(columns, dim=1))[1].sum(1).reshape(sent.shape)


def split(M: Tensor) -> tuple[Tensor, Tensor]:
    """Robust PCA: `min ‖L‖_* + λ ‖S‖_1` with `L + S = M`, `λ = 1/√max(d, K)` (Candès et al., arXiv:0912.3599).

    By the inexact augmented Lagrangian method (Lin, Chen, Ma, arXiv:1009.5055): singular values and entries are shrunk
    in turn, under a penalty that grows. Singular values come from the small Gram matrix, since clients are few.

    Args:
        M: `[d, K]`, float64.

    Returns:
        `(L, S)`, whose sum is M.
    """
    if len(M) < M.shape[1]:
        L, S = split(M.T)
        return L.T, S.T
    size = float(M.norm())
    S = torch.zeros_like(M)
    if size == 0:
        return M, S
    weight, spectral = 1 / math.sqrt(len(M)), float(torch.linalg.matrix_norm(M, 2))
    multiplier, penalty = M / max(spectral, float(M.abs().max()) / weight), 1.25 / spectral
    for _ in range(_MOST_STEPS):
        shifted = M - S + multiplier / penalty
        energies, V = torch.linalg.eigh(shifted.T @ shifted)
        values = energies.clamp_min(torch.finfo(M.dtype).tiny).sqrt()
        L = shifted @ ((V * (1 - 1 / (penalty * values)).clamp_min(0)) @ V.T)
        rest = M - L + multiplier / penalty
        before, S = S, rest.sign() * (rest.abs() - weight / penalty).clamp_min(0)
        missing = M - L - S
        multiplier, penalty = multiplier + penalty * missing, penalty * _GROWTH
        # The parts may add up while the split still moves.
        if max(float(missing.norm()), float((S - before).norm())) <= _TOLERANCE * size:
            break
    return M - S, S
