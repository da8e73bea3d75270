"""What a client tells of its examples for the closed-form head: counts, sums and the Gram matrix of their features.

    n_c = |{i : y_i = c}|      S_c = Σ_{y_i = c} x_i      G = Σ_i x_i x_iᵀ

They add over clients, so that their total is the same however examples are dealt out (Fed3R: Fanì et al., ICML 2024,
arXiv:2312.07358), and whoever can add can aggregate them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Rounding of what is sent in float32, relative to the trace of the total scatter.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class ClassSums:
    """Sums over examples, float64, on the CPU.

    Attributes:
        counts: ``[C]``, examples of each class.
        sums: ``[C, d]``, the sum of each class's features.
        gram: ``[d, d]``, symmetric.
    """

    counts: Tensor
    sums: Tensor
    gram: Tensor

    @classmethod
    def zeros(cls, num_classes: int, dim: int) -> "ClassSums":
        """The sums over no examples."""
        shapes = (num_classes,), (num_classes, dim), (dim, dim)
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, num_classes: int) -> "ClassSums":
        """The sums over examples.

        Args:
            features: ``[N, d]``.
            labels: ``[N]`` class ids.
            num_classes: C.
        """
        x, y = features.detach().double().cpu(), labels.cpu()
        sums = torch.zeros(num_classes, x.shape[1], dtype=torch.float64).index_add_(0, y, x)
        return cls(torch.bincount(y, minlength=num_classes).double(), sums, x.T @ x)

    def __add__(self, other: "ClassSums") -> "ClassSums":
        return ClassSums(self.counts + other.counts, self.sums + other.sums, self.gram + other.gram)

    def times(self, factor: float) -> "ClassSums":
        """The sums as of `factor` times as many such examples."""
        return ClassSums(self.counts * factor, self.sums * factor, self.gram * factor)

    def to_tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """What is sent: ``counts [C]`` and ``sums [C, d]`` in float64, and ``gram [d (d + 1) / 2]``.

        The last is the upper triangle of ``G − Σx Σxᵀ / n``, which holds as many digits of the features' variance as
        `dtype` has, however far from 0 they lie.
        """
        rows, columns = torch.triu_indices(*self.gram.shape)
        return {
            "counts": self.counts,
            "sums": self.sums,
            "gram": (self.gram - self._mean_gram())[rows, columns].to(dtype),
        }

    def _mean_gram(self) -> Tensor:
        total = self.sums.sum(0)
        return torch.outer(total, total) / self.counts.sum().clamp(min=1)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], num_classes: int, dim: int) -> "ClassSums":
        """The inverse of `to_tensors`, up to rounding to its dtype.

        Raises:
            ValueError: If names, shapes or dtypes are not those of `to_tensors`, or a value is not finite.
        """
        shapes = {"counts": (num_classes,), "sums": (num_classes, dim), "gram": (dim * (dim + 1) // 2,)}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != shapes:
            raise ValueError(f"the head's sums have shapes {found}; they must be {shapes}")
        if odd := [tensor.dtype for tensor in tensors.values() if tensor.dtype not in (torch.float32, torch.float64)]:
            raise ValueError(f"the head's sums are {odd[0]}; they must be torch.float32 or torch.float64")
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise ValueError("the head's sums hold values that are not finite")
        gram = torch.zeros(dim, dim, dtype=torch.float64)
        rows, columns = torch.triu_indices(dim, dim)
        gram[rows, columns] = gram[columns, rows] = tensors["gram"].double()
        centered = cls(tensors["counts"].double(), tensors["sums"].double(), gram)
        found_sums = replace(centered, gram=gram + centered._mean_gram())
        if not bool(found_sums.gram.isfinite().all()):
            raise ValueError("the head's sums are of features that are too large")
        return found_sums

    def to_vector(self) -> Tensor:
        """Counts, sums and the upper triangle of G, one after the other; vectors add up as sums do."""
        rows, columns = torch.triu_indices(*self.gram.shape)
        return torch.cat([self.counts, self.sums.flatten(), self.gram[rows, columns]])

    @staticmethod
    def vector_shape(num_classes: int, dim: int) -> tuple[int]:
        """The shape of `to_vector`."""
        return (num_classes + num_classes * dim + dim * (dim + 1) // 2,)

    @classmethod
    def from_vector(cls, vector: Tensor, num_classes: int, dim: int) -> "ClassSums":
        """The inverse of `to_vector`.

        Raises:
            ValueError: If the vector is not of that many numbers, or one is not finite.
        """
        sizes = [num_classes, num_classes * dim, dim * (dim + 1) // 2]
        if vector.shape != cls.vector_shape(num_classes, dim) or not bool(vector.isfinite().all()):
            raise ValueError(f"the head's sums are {tuple(vector.shape)} numbers; {sum(sizes)} finite ones are needed")
        counts, sums, triangle = torch.split(vector.double(), sizes)
        gram = torch.zeros(dim, dim, dtype=torch.float64)
        rows, columns = torch.triu_indices(dim, dim)
        gram[rows, columns] = gram[columns, rows] = triangle
        return cls(counts, sums.view(num_classes, dim), gram)

    def check(self) -> None:
        """Check that some examples have these sums; for sums without noise.

        Counts are whole and not negative, a class without examples has no sum, and the scatter within classes,
        ``G − Σ_c S_c S_cᵀ / n_c``, is positive semidefinite, which bounds every sum by the Gram matrix.

        Raises:
            ValueError: If none can.
        """
        if (self.counts < 0).any() or (self.counts - self.counts.round()).abs().max() > 1e-6:
            raise ValueError("the head's counts are not whole numbers of at least 0")
        if (self.sums[self.counts == 0] != 0).any():
            raise ValueError("the head's sums tell of features of a class that has no examples")
        scatter = self.within_scatter()
        trace = float((self.gram - self._mean_gram()).trace())
        shifted = scatter + _ROUNDING * max(trace, 1e-300) * torch.eye(len(scatter), dtype=torch.float64)
        if trace < 0 or int(torch.linalg.cholesky_ex(shifted).info) != 0:
            raise ValueError("the head's sums are those of no examples: the scatter within classes has a negative side")

    def within_scatter(self) -> Tensor:
        """``G − Σ_c S_c S_cᵀ / n_c``, ``[d, d]``."""
        return self.gram - (self.sums / self.counts.clamp(min=1)[:, None]).T @ self.sums
