"""Cold starts: block factors of a target from its entries alone.

Random starting points fail for more than one block. What works is algebra on the `r × r` cores
`G_ij = U_iᵀ M_ij V_j`, where `U_i` and `V_j` span the leading `r` left and right directions of every block row and
block column. If `M` is a set of block factors of rank r, then `G_ij = X_i D_ij Y_j` with diagonal `D_ij`, and

    G_00 G_10⁻¹ G_11 G_01⁻¹ = X_0 (D_00 D_11 / D_10 D_01) X_0⁻¹,

so that eigenvectors give `X_0`, `X_0⁻¹ G_0j` gives every `Y_j` up to scale, and a rank-one fit a component gives the
rest. Without noise this is exact.

With noise the few blocks and components of most energy decide, and pieces of different components are taken for one
another. Raising the singular values of every core to a power `a < 1` evens the pieces out and, as long as the columns
of `X_i` and `Y_j` are not far from orthogonal, leaves the structure `X_i D_ij^a Y_j` in place: the fit is found at a
small power and followed as the power rises to one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import torch
from torch import Tensor

from bora_fl.blocks.least_squares import Fit, fit_from, normalized
from bora_fl.blocks.targets import CoreTarget, Target

_EXACT_SLAB = 96  # slabs of at most this many rows or columns are decomposed exactly, larger ones iteratively
_POWERS = (0.15, 0.25, 0.35, 0.5, 0.7)


def leading_subspaces(target: Target, dim: int) -> Tensor:
    """Leading left singular directions of every block row `[M_i1 … M_ib]`, `[b, k, dim]`."""
    first = target.row(0)
    b, k, _ = first.shape
    subspaces = first.new_zeros(b, k, dim)
    for i in range(b):
        slab = target.row(i).permute(1, 0, 2).reshape(k, -1)
        subspaces[i] = _leading_directions(slab, dim)
    return subspaces


def _leading_directions(slab: Tensor, dim: int) -> Tensor:
    if min(slab.shape) <= max(_EXACT_SLAB, 2 * dim):
        full = slab.shape[1] < dim
        exact: Tensor = torch.linalg.svd(slab, full_matrices=full).U
        return exact[:, :dim]
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(slab.shape[1], dim + 16, generator=generator, dtype=slab.dtype).to(slab.device)
    basis: Tensor = torch.linalg.qr(slab @ probe).Q
    for _ in range(2):
        basis = torch.linalg.qr(slab @ torch.linalg.qr(slab.mT @ basis).Q).Q
    directions: Tensor = torch.linalg.svd(basis.mT @ slab, full_matrices=False).U
    return basis @ directions[:, :dim]


def by_eigenvectors(cores: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Fit:
    """Factors from two block rows and two block columns of square cores `[b, b, r, r]`, extended to all blocks."""
    (i, other_i), (j, other_j) = rows, columns
    inverse = torch.linalg.pinv(torch.stack([cores[other_i, j], cores[i, other_j]]), rtol=1e-14)
    values, vectors = torch.linalg.eig(cores[i, j] @ inverse[0] @ cores[other_i, other_j] @ inverse[1])
    # A complex pair spans the same plane as its real and imaginary parts.
    directions = torch.where(values.imag < 0, vectors.imag, vectors.real)
    right = (torch.linalg.pinv(directions, rtol=1e-14) @ cores[i]).mT
    right = right / right.norm(dim=1, keepdim=True).clamp_min(torch.finfo(right.dtype).tiny)
    weighted_left = cores @ torch.linalg.pinv(right, rtol=1e-12).mT.unsqueeze(0)
    slabs = weighted_left.permute(0, 3, 2, 1)  # [i, component, k, j], of rank one without noise
    u, s, vh = torch.linalg.svd(slabs, full_matrices=False)
    sigma = (s[..., :1] * vh[..., 0, :]).permute(0, 2, 1)
    return normalized(Fit(u[..., 0].mT.contiguous(), sigma.contiguous(), right))


def single_component(cores: Tensor, sweeps: int = 6) -> Fit:
    """A best block component (rank 1) of cores `[b, b, k, l]`, grown from the most energetic block."""
    b = cores.shape[0]
    i, j = divmod(int(cores.square().sum((2, 3)).argmax()), b)
    left = torch.linalg.svd(cores[i, j], full_matrices=False).U[:, 0]
    right = torch.einsum("juv,u->jv", cores[i], left)
    right = right / right.norm(dim=1, keepdim=True).clamp_min(torch.finfo(right.dtype).tiny)
    all_left = right
    for _ in range(sweeps):
        seen = torch.einsum("ijuv,jv->iuj", cores, right)
        all_left = torch.linalg.svd(seen, full_matrices=False).U[..., 0]
        seen = torch.einsum("ijuv,iu->jvi", cores, all_left)
        right = torch.linalg.svd(seen, full_matrices=False).U[..., 0]
    sigma = torch.einsum("iu,ijuv,jv->ij", all_left, cores, right)
    return Fit(all_left.unsqueeze(2), sigma.unsqueeze(2), right.unsqueeze(2))


def by_deflation(cores: Tensor, rank: int, sweeps: int = 3) -> Fit:
    """Factors grown one component at a time from the residual, refitted after each."""
    target = CoreTarget.of(cores)
    fit = single_component(cores)
    for _ in range(1, rank):
        rest = cores - torch.einsum("iuk,ijk,jvk->ijuv", fit.left, fit.sigma, fit.right)
        new = single_component(rest)
        grown = Fit(*(torch.cat(pair, dim=2) for pair in zip(_parts(fit), _parts(new), strict=True)))
        fit, _ = fit_from(target, grown, sweeps, 0.0)
    return fit


def _parts(fit: Fit) -> tuple[Tensor, Tensor, Tensor]:
    return fit.left, fit.sigma, fit.right


def _powered(cores: Tensor, power: float) -> Tensor:
    u, s, vh = torch.linalg.svd(cores, full_matrices=False)
    powered: Tensor = (u * s.pow(power).unsqueeze(-2)) @ vh
    return powered


def _quadruples(b: int, count: int, seed: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    generator = torch.Generator().manual_seed(seed)
    pairs = list(permutations(range(b), 2))
    picks = torch.randint(len(pairs), (count, 2), generator=generator).tolist()
    return [(pairs[a], pairs[c]) for a, c in picks]


def _best_by_eigenvectors(cores: Tensor, tries: int, seed: int) -> tuple[Fit, float]:
    target = CoreTarget.of(cores)
    best: tuple[Fit, float] | None = None
    for rows, columns in _quadruples(cores.shape[0], tries, seed):
        fit, history = fit_from(target, by_eigenvectors(cores, rows, columns), 3, 0.0)
        if best is None or history[-1] < best[1]:
            best = fit, history[-1]
        if best[1] < 1e-6:
            break
    assert best is not None
    return best


def _followed(cores: Tensor, fit: Fit, powers: tuple[float, ...], sweeps: int) -> tuple[Fit, float]:
    for power in (*powers, 1.0):
        target = CoreTarget.of(cores if power == 1.0 else _powered(cores, power))
        fit, history = fit_from(target, fit, sweeps, 1e-2)
    return fit, history[-1]


def cold_starts(target: Target, rank: int, attempts: int, sweeps: int = 40) -> Iterator[Fit]:
    """Starting points from the target alone, the most promising and cheapest first.

    Stops early when a start is as good as exact.

    Args:
        target: What to fit.
        rank: Number of components of every start.
        attempts: Number of starting points that follow the rising power, for targets with noise.
        sweeps: Least-squares sweeps at most at every power.

    Yields:
        Fits in the target's coordinates.
    """
    _, height, width = target.row(0).shape
    rows = leading_subspaces(target, min(rank, height))
    columns = leading_subspaces(target.T, min(rank, width))
    cores = target.restricted(rows, columns).cores
    b = cores.shape[0]

    def expanded(fit: Fit) -> Fit:
        return Fit(rows @ fit.left, fit.sigma, columns @ fit.right)

    square = b > 1 and rows.shape[2] == rank == columns.shape[2]
    if square:
        fit, error = _best_by_eigenvectors(cores, 2, 0)
        yield expanded(fit)
        if error < 1e-6:
            return
    for attempt in range(attempts):
        if square and attempt % 2 == 0:
            powers: tuple[float, ...] = _POWERS
            fit, _ = _best_by_eigenvectors(_powered(cores, powers[0]), 6, attempt)
        else:
            powers = _POWERS[1:]
            fit = by_deflation(_powered(cores, powers[0]), rank)
        yield expanded(_followed(cores, fit, powers, sweeps)[0])
    yield expanded(by_deflation(cores, rank))
