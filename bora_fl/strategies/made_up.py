"""Made-up block factors, and what training makes of them: for trials and tests of strategies, without a model."""

from typing import Literal

import torch
from torch import Tensor

from bora_fl.blocks import BlockFactors

Transform = Literal["exp_norm", "identity"]


def factors(
    generator: torch.Generator,
    m: int,
    n: int,
    *,
    rank: int,
    blocks: int,
    transform: Transform,
    plain: bool = False,
    trained: bool = True,
    dtype: torch.dtype = torch.float32,
) -> BlockFactors:
    """A layer's factors.

    Args:
        generator: Where the numbers come from.
        m: Rows of the frozen weight.
        n: Columns of the frozen weight.
        rank: r.
        blocks: b.
        transform: As for ``adapter.sigma-transform``.
        plain: Plain LoRA: Sigma is 1.
        trained: Whether B is not zero.
        dtype: Of the factors.
    """
    A = (2 * torch.rand(rank, n, generator=generator, dtype=dtype) - 1) / n**0.5
    log = 2 * torch.rand(blocks, blocks, rank, generator=generator, dtype=dtype) - 1
    sigma = torch.ones(blocks, blocks, rank, dtype=dtype) if plain else _in_range(log, transform)
    B = torch.randn(m, rank, generator=generator, dtype=dtype) if trained else torch.zeros(m, rank, dtype=dtype)
    return BlockFactors(B, sigma, A, 2.0)


def drifted(
    generator: torch.Generator,
    sent: BlockFactors,
    parts: frozenset[str],
    size: float,
    transform: Transform,
    plain: bool = False,
) -> BlockFactors:
    """What a client returns: every part that is trained has moved by a random amount.

    Args:
        generator: Where the amounts come from.
        sent: The factors that it was sent.
        parts: Those that are trained, of A, sigma and B.
        size: Of the amounts; those of A are relative to A.
        transform: As for ``adapter.sigma-transform``.
        plain: Plain LoRA: Sigma stays 1.
    """
    noise = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (sent.B, sent.sigma, sent.A)]
    step = [size * t.to(sent.B.dtype) for t in noise]
    sigma = sent.sigma * step[1].exp()
    sigma = _in_range(sigma.log(), transform) if transform == "exp_norm" else sigma
    return BlockFactors(
        sent.B + step[0] if "B" in parts else sent.B,
        sigma if "sigma" in parts and not plain else sent.sigma,
        sent.A + step[2] * sent.A.std() if "A" in parts else sent.A,
        sent.scaling,
    )


def _in_range(log: Tensor, transform: Transform) -> Tensor:
    return (log / log.abs().mean()).exp() if transform == "exp_norm" else log.exp()
