"""Block factors and federations of known structure, for tests and benchmarks of the block algebra."""

from __future__ import annotations

import math

import torch

from bora_fl.blocks.factors import BlockFactors

F64 = torch.float64


def random_factors(
    seed: int, m: int = 24, n: int = 32, b: int = 4, r: int = 3, scaling: float = 0.5, positive: bool = False
) -> BlockFactors:
    """Gaussian B and A; Sigma Gaussian, or log-uniform on (e⁻², e²) where it must be positive."""
    g = torch.Generator().manual_seed(seed)
    B, A = torch.randn(m, r, generator=g, dtype=F64), torch.randn(r, n, generator=g, dtype=F64)
    if positive:
        sigma = torch.exp(4 * torch.rand(b, b, r, generator=g, dtype=F64) - 2)
    else:
        sigma = torch.randn(b, b, r, generator=g, dtype=F64)
    return BlockFactors(B, sigma, A, scaling)


def drifting_clients(
    seed: int, clients: int, m: int = 48, n: int = 64, b: int = 4, r: int = 4, drift: float = 0.3
) -> list[BlockFactors]:
    """Clients around one common adapter with a Sigma of exp_norm's range."""
    g = torch.Generator().manual_seed(seed)
    base = random_factors(seed + 1000, m, n, b, r, positive=True)

    def noise(t: torch.Tensor) -> torch.Tensor:
        return drift * torch.randn(t.shape, generator=g, dtype=F64)

    updates = []
    for _ in range(clients):
        log_sigma = base.sigma.log() + noise(base.sigma)
        sigma = (log_sigma / log_sigma.abs().mean()).exp()
        updates.append(BlockFactors(base.B + noise(base.B), sigma, base.A + noise(base.A), base.scaling))
    return updates


def planted(seed: int, b: int, r: int, side: int) -> BlockFactors:
    """Nearly orthogonal components, column scales over two orders a side, Sigma over four."""
    g = torch.Generator().manual_seed(seed)

    def columns() -> torch.Tensor:
        frame = torch.linalg.qr(torch.randn(b, side, r, generator=g, dtype=F64)).Q
        frame = frame + 0.3 * torch.randn(b, side, r, generator=g, dtype=F64) / math.sqrt(side)
        scaled: torch.Tensor = frame * 10 ** (2 * torch.rand(b, 1, r, generator=g, dtype=F64) - 1)
        return scaled

    left, right = columns(), columns()
    sigma = 10 ** (4 * torch.rand(b, b, r, generator=g, dtype=F64) - 2)
    return BlockFactors(left.reshape(b * side, r), sigma, right.permute(2, 0, 1).reshape(r, b * side), 1.0)


def from_dense(update: torch.Tensor, b: int) -> BlockFactors:
    """Any matrix `[m, n]` as block factors of rank n: one component for every column, which hides all structure."""
    n = update.shape[1]
    sigma = torch.eye(b, dtype=update.dtype).repeat_interleave(n // b, 1).expand(b, b, n)
    return BlockFactors(update, sigma, torch.eye(n, dtype=update.dtype), 1.0)
