import numpy as np
import pytest
import torch
from torch import Tensor

from bora_fl.kernels.dropout import drop_threshold, keep_mask, keep_scale
from bora_fl.kernels.reference import bora_branch_reference, exp_norm


def draw(b: int, r: int, p: int, q: int, tokens: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(b * 100 + r)
    shapes = (tokens, b * p), (r, b * p), (b, b, r), (b * q, r)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def dense_update(A: Tensor, Sigma: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The definition, block by block: delta_W[i, j] = scaling · B_i diag(Sigma[i, j]) A_j."""
    b = len(Sigma)
    rows = [
        torch.cat([B_i @ torch.diag(Sigma[i, j]) @ A_j for j, A_j in enumerate(A.chunk(b, 1))], 1)
        for i, B_i in enumerate(B.chunk(b))
    ]
    return scaling * torch.cat(rows)


@pytest.mark.parametrize(("b", "r", "p", "q"), [(1, 1, 1, 1), (1, 4, 5, 3), (2, 3, 4, 6), (4, 5, 3, 1)])
def test_output_and_gradients_are_those_of_the_dense_update(b: int, r: int, p: int, q: int) -> None:
    x, A, Sigma, B = inputs = draw(b, r, p, q)
    found = bora_branch_reference(x, A, Sigma, B, 0.7)
    expected = x @ dense_update(A, Sigma, B, 0.7).T
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(found)
    pairs = zip(torch.autograd.grad(found, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True)
    for name, (mine, theirs) in zip(("x", "A", "Sigma", "B"), pairs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_pass_gradcheck_through_dropout_and_exp_norm() -> None:
    x, A, sigma, B = draw(2, 3, 4, 3)
    seed = torch.tensor(11)

    def layer(x: Tensor, A: Tensor, sigma: Tensor, B: Tensor) -> Tensor:
        return bora_branch_reference(x, A, exp_norm(sigma), B, 0.7, dropout_p=0.3, seed=seed)

    assert torch.autograd.gradcheck(layer, (x, A, sigma, B))


def test_only_gradients_asked_for_are_returned() -> None:
    x, A, Sigma, B = (tensor.detach() for tensor in draw(2, 3, 4, 3))
    B.requires_grad_()
    bora_branch_reference(x, A, Sigma, B, 1.0).sum().backward()
    assert B.grad is not None
    assert x.grad is A.grad is Sigma.grad is None


def test_one_block_with_unit_sigma_is_lora() -> None:
    x, A, _, B = draw(1, 3, 5, 4)
    ones = torch.ones(1, 1, 3, dtype=torch.float64)
    torch.testing.assert_close(bora_branch_reference(x, A, ones, B, 2.0), 2.0 * x @ A.T @ B.T)


def test_exp_norm_is_positive_scale_free_and_of_unit_log_mean() -> None:
    sigma = torch.randn(3, 3, 5, dtype=torch.float64, requires_grad=True)
    Sigma = exp_norm(sigma)
    assert (Sigma > 0).all()
    torch.testing.assert_close(exp_norm(sigma * 17.0), Sigma)
    torch.testing.assert_close(Sigma.log().abs().mean(), torch.ones((), dtype=torch.float64))
    (gradient,) = torch.autograd.grad(Sigma, sigma, torch.randn_like(Sigma))
    assert abs(float(((gradient * sigma).sum() / (gradient.norm() * sigma.norm())).detach())) < 1e-12
    assert torch.autograd.gradcheck(exp_norm, (sigma,))


def test_exp_norm_of_zeros_is_ones_with_no_gradient() -> None:
    sigma = torch.zeros(2, 2, 3, requires_grad=True)
    Sigma = exp_norm(sigma)
    Sigma.sum().backward()
    assert torch.equal(Sigma, torch.ones(2, 2, 3))
    assert torch.equal(sigma.grad, torch.zeros(2, 2, 3))


def test_dropout_without_a_seed_is_refused() -> None:
    x, A, Sigma, B = draw(1, 1, 1, 1)
    with pytest.raises(ValueError, match="needs a seed"):
        bora_branch_reference(x, A, Sigma, B, 1.0, dropout_p=0.5)


def philox(seed: int, counter: tuple[int, int, int, int], rounds: int) -> list[int]:
    """Philox4x32 on Python's integers, as in the paper."""
    (k0, k1), (c0, c1, c2, c3) = (seed & 0xFFFFFFFF, seed >> 32), counter
    for _ in range(rounds):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (second >> 32) ^ c1 ^ k0, second & 0xFFFFFFFF
        c2, c3 = (first >> 32) ^ c3 ^ k1, first & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def test_the_oracle_gives_the_known_answer_of_random123() -> None:
    """The known-answer vectors of the Random123 distribution: counter and key zero, philox4x32-10."""
    assert philox(0, (0, 0, 0, 0), 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_mask_is_philox_on_token_and_column() -> None:
    seed, p = 2**45 + 12345, 0.37
    found = keep_mask(40, 21, p, torch.tensor(seed))
    for token in range(40):
        for column in range(21):
            half, word = divmod(column % 8, 4)
            bits = philox(seed, (column // 8, token, 0, 0), 7)[word] >> (16 * half) & 0xFFFF
            assert bool(found[token, column]) == (bits >= round(p * 2**16))


def test_mask_keeps_the_share_and_the_mean_it_promises() -> None:
    p = 0.1
    kept = keep_mask(500, 1000, p, torch.tensor(3)).double()
    assert abs(float(kept.mean()) - (1 - p)) < 4 * np.sqrt(p * (1 - p) / kept.numel())
    assert keep_scale(p) == 2**16 / (2**16 - drop_threshold(p))
    assert keep_scale(0.0) == 1.0
    assert keep_mask(5, 9, 0.0, torch.tensor(3)).all()
