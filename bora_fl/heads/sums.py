"""What a client tells of its examples for the closed-form head: counts, sums and the Gram matrix of their features.

    n_c = |{i : y_i = c}|      S_c = Σ_{y_i = c} x_i      G = Σ_i x_i x_iᵀ

They add over clients, so that their total is the same however examples are dealt out (Fed3R: Fanì et al., ICML 2024,
arXiv:2312.07358), and whoever can add can aggregate them.

Where an example may have several classes, or none, a last row stands for all examples: their number and ``Σ_i x_i``,
which the other rows do not give then. Where it has a number ``y_i``, that is one feature more, the last: all examples
are of one class, and G has ``Σ_i y_i x_i`` and ``Σ_i y_i²`` in its last row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Rounding of what is sent in float32, relative to the trace of the total scatter.
_ROUNDING = 1e-5
# That of float64 where the scatter is what is left of sums of squares, relative to these.
_CANCELLED = 1e-12


@dataclass(frozen=True)
class ClassSums:
    """Sums over examples, float64, on the CPU.

    Attributes:
        counts: ``[C]``, examples of each class; with `several` ``[C + 1]``.
        sums: ``[C, d]``, the sum of each class's features; with `several` ``[C + 1, d]``.
        gram: ``[d, d]``, symmetric.
        several: Whether an example may have several classes, or none.
    """

    counts: Tensor
    sums: Tensor
    gram: Tensor
    several: bool = False

    @classmethod
    def zeros(cls, num_classes: int, dim: int) -> "ClassSums":
        """The sums over no examples."""
        counts, sums, gram = (
            torch.zeros(shape, dtype=torch.float64) for shape in ((num_classes,), (num_classes, dim), (dim, dim))
        )
        return cls(counts, sums, gram)

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, num_classes: int) -> "ClassSums":
        """The sums over examples.

        Args:
            features: ``[N, d]``.
            labels: ``[N]`` class ids, or ``[N, C]`` float, 1 for the classes that an example has, or ``[N]`` float
                numbers, with which d is one more.
            num_classes: C.
        """
        x, y = features.detach().double().cpu(), labels.cpu()
        if y.is_floating_point() and y.dim() == 1:
            x, y = torch.cat([x, y[:, None].double()], 1), torch.zeros(len(y), dtype=torch.int64)
        if y.is_floating_point():
            has = torch.cat([y.double(), torch.ones(len(y), 1, dtype=torch.float64)], 1)
            return cls(has.sum(0), has.T @ x, x.T @ x, several=True)
        sums = torch.zeros(num_classes, x.shape[1], dtype=torch.float64).index_add_(0, y, x)
        return cls(torch.bincount(y, minlength=num_classes).double(), sums, x.T @ x)

    def __add__(self, other: "ClassSums") -> "ClassSums":
        return replace(
            self, counts=self.counts + other.counts, sums=self.sums + other.sums, gram=self.gram + other.gram
        )

    def times(self, factor: float) -> "ClassSums":
        """The sums as of `factor` times as many such examples."""
        return replace(self, counts=self.counts * factor, sums=self.sums * factor, gram=self.gram * factor)

    @property
    def examples(self) -> float:
        """How many examples they are over."""
        return float(self.counts[-1] if self.several else self.counts.sum())

    @property
    def total(self) -> Tensor:
        """``[d]``, the sum of all features."""
        return self.sums[-1] if self.several else self.sums.sum(0)

    def of_classes(self) -> tuple[Tensor, Tensor]:
        """``[C]`` counts and ``[C, d]`` sums of the classes alone."""
        return (self.counts[:-1], self.sums[:-1]) if self.several else (self.counts, self.sums)

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
        return torch.outer(self.total, self.total) / max(self.examples, 1.0)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], rows: int, dim: int, *, several: bool = False) -> "ClassSums":
        """The inverse of `to_tensors`, up to rounding to its dtype.

        Args:
            tensors: By name.
            rows: Of counts and sums.
            dim: d.
            several: See `ClassSums`.

        Raises:
            ValueError: If names, shapes or dtypes are not those of `to_tensors`, or a value is not finite.
        """
        shapes = {"counts": (rows,), "sums": (rows, dim), "gram": (dim * (dim + 1) // 2,)}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != shapes:
            raise ValueError(f"the head's sums have shapes {found}; they must be {shapes}")
        if odd := [tensor.dtype for tensor in tensors.values() if tensor.dtype not in (torch.float32, torch.float64)]:
            raise ValueError(f"the head's sums are {odd[0]}; they must be torch.float32 or torch.float64")
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise ValueError("the head's sums hold values that are not finite")
        gram = torch.zeros(dim, dim, dtype=torch.float64)
        row, column = torch.triu_indices(dim, dim)
        gram[row, column] = gram[column, row] = tensors["gram"].double()
        centered = cls(tensors["counts"].double(), tensors["sums"].double(), gram, several)
        found_sums = replace(centered, gram=gram + centered._mean_gram())
        if not bool(found_sums.gram.isfinite().all()):
            raise ValueError("the head's sums are of features that are too large")
        return found_sums

    def to_vector(self) -> Tensor:
        """Counts, sums and the upper triangle of G, one after the other; vectors add up as sums do."""
        rows, columns = torch.triu_indices(*self.gram.shape)
        return torch.cat([self.counts, self.sums.flatten(), self.gram[rows, columns]])

    @staticmethod
    def vector_shape(rows: int, dim: int) -> tuple[int]:
        """The shape of `to_vector`."""
        return (rows + rows * dim + dim * (dim + 1) // 2,)

    @classmethod
    def from_vector(cls, vector: Tensor, rows: int, dim: int, *, several: bool = False) -> "ClassSums":
        """The inverse of `to_vector`.

        Raises:
            ValueError: If the vector is not of that many numbers, or one is not finite.
        """
        sizes = [rows, rows * dim, dim * (dim + 1) // 2]
        if vector.shape != cls.vector_shape(rows, dim) or not bool(vector.isfinite().all()):
            raise ValueError(f"the head's sums are {tuple(vector.shape)} numbers; {sum(sizes)} finite ones are needed")
        counts, sums, triangle = torch.split(vector.double(), sizes)
        gram = torch.zeros(dim, dim, dtype=torch.float64)
        row, column = torch.triu_indices(dim, dim)
        gram[row, column] = gram[column, row] = triangle
        return cls(counts, sums.view(rows, dim), gram, several)

    def check(self, *, number: bool = False) -> None:
        """Check that some examples have these sums; for sums without noise.

        Counts are whole and not negative, a class without examples has no sum, and the scatter within classes,
        ``G − Σ_c S_c S_cᵀ / n_c``, is positive semidefinite, which bounds every sum by the Gram matrix. With `several`
        it is that within each class and the examples that are not of it: with the scatter ``T = G − Σx Σxᵀ / n`` around
        the mean of all, and ``b_c = S_c − n_c Σx / n``,

            b_cᵀ T⁻¹ b_c ≤ n_c (n − n_c) / n.

        Args:
            number: Whether the last feature is a number to be predicted, which may have any unit.

        Raises:
            ValueError: If none can.
        """
        if (self.counts < 0).any() or (self.counts - self.counts.round()).abs().max() > 1e-6:
            raise ValueError("the head's counts are not whole numbers of at least 0")
        if (self.sums[self.counts == 0] != 0).any():
            raise ValueError("the head's sums tell of features of a class that has no examples")
        around = self.gram - self._mean_gram()
        scatter = around if self.several else self.within_scatter()
        parts = [len(scatter) - number, int(number)]
        room, negative = [], False
        diagonals = (torch.split(matrix.diagonal(), parts) for matrix in (around, self.gram))
        for spread, square in zip(*diagonals, strict=True):
            cancelled = _CANCELLED * float(square.sum())
            negative |= float(spread.sum()) < -cancelled
            room.append(torch.full_like(spread, _ROUNDING * max(float(spread.sum()), 1e-300) + cancelled))
        factor, failed = torch.linalg.cholesky_ex(scatter + torch.diag(torch.cat(room)))
        if negative or int(failed) != 0 or (self.several and not self._fits(factor)):
            raise ValueError("the head's sums are those of no examples: the scatter within classes has a negative side")

    def _fits(self, factor: Tensor) -> bool:
        """Whether each class's sum lies within the scatter around the mean, of which `factor` is the Cholesky one."""
        counts, sums = self.of_classes()
        n = self.examples
        if bool((counts > n).any()):
            return False
        apart = sums - counts[:, None] * self.total / max(n, 1.0)
        reach = torch.linalg.solve_triangular(factor, apart.T, upper=False).square().sum(0)
        return bool((reach <= counts * (n - counts) / max(n, 1.0) * (1 + _ROUNDING) + _ROUNDING).all())

    def within_scatter(self) -> Tensor:
        """``G − Σ_c S_c S_cᵀ / n_c``, ``[d, d]``."""
        return self.gram - (self.sums / self.counts.clamp(min=1)[:, None]).T @ self.sums
