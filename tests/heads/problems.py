"""Gaussian classes with one covariance, some features of large scale."""

import torch
from torch import Tensor

from bora_fl.heads import ClassSums


def problem(n: int = 400, d: int = 6, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=generator)
    centres = torch.randn(classes, d, generator=generator, dtype=torch.float64)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    x = centres[y] + torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + 2
    return x, y


def sums_of(x: Tensor, y: Tensor, classes: int = 3) -> ClassSums:
    return ClassSums.of(x, y, classes)
