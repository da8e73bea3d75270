"""What FedSVD's step does to private training of B alone: it rotates, and plain SGD does not see a rotation.

After a round B̄ A has the row space of A, so its SVD gives A' = R A with R orthogonal when A has orthonormal rows, and
B' = B̄ Rᵀ. Gradients turn along, their norms stay, and isotropic noise has the same law in every basis: the products of
FedSVD are those of FFA with the same orthonormal A. What is not a rotation's equal breaks it: an optimizer that works
entry by entry, moments that outlive the turn of the basis, or a start that is not orthonormal.
"""

import pytest
import torch

ROUNDS, CLIENTS, SAMPLES, STEPS = 15, 3, 12, 3
M, N, RANK, CLIP = 10, 8, 3, 0.5


def problems():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(M, N, dtype=torch.float64, generator=generator)
    data = []
    for _ in range(CLIENTS):
        x = torch.randn(SAMPLES, N, dtype=torch.float64, generator=generator)
        y = x @ target.T + torch.randn(SAMPLES, M, dtype=torch.float64, generator=generator)
        data.append((x, y))
    return data


def private_gradient(B, A, x, y, noise):
    """Clipped per-sample gradients of ½|B A x − y|² in B, summed, plus noise."""
    residual, z = x @ A.T @ B.T - y, x @ A.T
    gradients = torch.einsum("sm,sr->smr", residual, z)
    factors = (CLIP / gradients.flatten(1).norm(dim=1)).clamp(max=1.0)
    return (torch.einsum("s,smr->mr", factors, gradients) + noise) / SAMPLES


class Sgd:
    def __init__(self, momentum=0.0):
        self.momentum, self.velocity = momentum, 0.0

    def step(self, B, gradient):
        self.velocity = self.momentum * self.velocity + gradient
        return B - 0.3 * self.velocity


class Adam:
    def __init__(self):
        self.first, self.second, self.count = 0.0, 0.0, 0

    def step(self, B, gradient):
        self.count += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.99 * self.second + 0.01 * gradient**2
        mean, square = self.first / (1 - 0.9**self.count), self.second / (1 - 0.99**self.count)
        return B - 0.05 * mean / (square.sqrt() + 1e-8)


def federate(A, turn, make_optimizer, *, noise=1.0, keep_state=False, couple=True):
    """Return the product of every round; `turn` re-bases with an SVD as FedSVD does, else A stays (FFA).

    Noise is drawn for FFA's basis. `couple` turns it into the basis of the moment, which its law does not notice.
    """
    generator = torch.Generator().manual_seed(1)
    start, B, products = A, torch.zeros(M, RANK, dtype=torch.float64), []
    optimizers = [make_optimizer() for _ in range(CLIENTS)]
    data = problems()
    for _ in range(ROUNDS):
        merged = torch.zeros_like(B)
        for k, (x, y) in enumerate(data):
            optimizer = optimizers[k] if keep_state else make_optimizer()
            local = B
            for _ in range(STEPS):
                drawn = noise * CLIP * torch.randn(M, RANK, dtype=torch.float64, generator=generator)
                rotation = A @ torch.linalg.pinv(start) if couple else torch.eye(RANK, dtype=torch.float64)
                local = optimizer.step(local, private_gradient(local, A, x, y, drawn @ rotation.T))
            merged += local / CLIENTS
        B = merged
        if turn:
            U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
            B, A = U[:, :RANK] * S[:RANK], Vh[:RANK]
        products.append(B @ A)
    return torch.stack(products)


def orthonormal():
    generator = torch.Generator().manual_seed(2)
    return torch.linalg.qr(torch.randn(N, RANK, dtype=torch.float64, generator=generator)).Q.T


def gap(A, make_optimizer, **settings):
    ffa, fedsvd = (federate(A, turn, make_optimizer, **settings) for turn in (False, True))
    return float((ffa - fedsvd).norm() / ffa.norm())


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_with_sgd_the_products_are_equal(noise):
    assert gap(orthonormal(), Sgd, noise=noise) < 1e-12


def test_momentum_that_starts_anew_every_round_turns_along():
    assert gap(orthonormal(), lambda: Sgd(0.9)) < 1e-12


def test_momentum_that_outlives_the_turn_does_not():
    assert gap(orthonormal(), lambda: Sgd(0.9), keep_state=True) > 1e-2


def test_adam_works_entry_by_entry_and_sees_the_basis():
    assert gap(orthonormal(), Adam) > 1e-2


def test_a_start_that_is_not_orthonormal_is_another_method():
    stretched = torch.diag(torch.tensor([3.0, 1.0, 0.3], dtype=torch.float64)) @ orthonormal()
    assert gap(stretched, Sgd, noise=0.0) > 1e-2


def test_without_coupling_the_noise_differs_and_its_law_does_not():
    """Same seeds, other noise: single runs differ, second moments of the products' noise agree."""
    fedsvd = [federate(orthonormal(), True, Sgd, couple=couple)[-1] for couple in (True, False)]
    assert not torch.allclose(*fedsvd)
    rotation = torch.linalg.qr(torch.randn(RANK, RANK, dtype=torch.float64)).Q
    noise = torch.randn(4000, M, RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    A = orthonormal()
    plain, turned = noise @ A, noise @ rotation.T @ A
    for part in (plain, turned):
        covariance = torch.einsum("smn,smk->nk", part, part) / (4000 * M)
        torch.testing.assert_close(covariance, A.T @ A, rtol=0, atol=0.03)


def test_the_row_space_never_leaves_the_start():
    A = orthonormal()
    products = federate(A, True, Adam)
    outside = products @ (torch.eye(N, dtype=torch.float64) - A.T @ A)
    assert outside.norm() < 1e-10 * products.norm()
