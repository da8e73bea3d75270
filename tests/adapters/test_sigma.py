import pytest
import torch
from torch import Tensor

from bora_fl.adapters.sigma import init_sigma_, to_effective, to_raw


def plain_exp_norm(sigma: Tensor) -> Tensor:
    return torch.exp(sigma / sigma.abs().mean())


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 7), (2, 2, 3), (8, 8, 16)])
def test_exp_norm_and_its_gradient_equal_plain_autograd(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    sigma, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    ours, plain = sigma.clone().requires_grad_(), sigma.clone().requires_grad_()
    value, expected = to_effective(ours, "exp_norm"), plain_exp_norm(plain)
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=0)
    (value * weight).sum().backward()
    (expected * weight).sum().backward()
    scale = plain.grad.abs().max().item() + weight.abs().max().item()
    assert (ours.grad - plain.grad).abs().max().item() <= 1e-13 * scale


def test_exp_norm_ignores_scale_and_has_unit_mean_log() -> None:
    torch.manual_seed(0)
    sigma = torch.randn(3, 3, 4, dtype=torch.float64, requires_grad=True)
    Sigma = to_effective(sigma, "exp_norm")
    torch.testing.assert_close(to_effective(17.0 * sigma, "exp_norm"), Sigma, rtol=1e-13, atol=0)
    assert Sigma.log().abs().mean().item() == pytest.approx(1, rel=1e-14)
    Sigma.square().sum().backward()
    assert abs((sigma.grad * sigma).sum().item()) <= 1e-12 * (sigma.grad.norm() * sigma.norm()).item()


def test_identity_is_itself() -> None:
    sigma = torch.randn(2, 2, 3)
    assert to_effective(sigma, "identity") is sigma
    raw = to_raw(sigma, "identity")
    assert torch.equal(raw, sigma)
    assert raw.data_ptr() != sigma.data_ptr()


@pytest.mark.parametrize(("num_blocks", "rank"), [(1, 4), (2, 8), (8, 16)])
def test_raw_sigma_returns_to_the_same_sigma_at_the_scale_of_a_fresh_one(num_blocks: int, rank: int) -> None:
    torch.manual_seed(0)
    fresh = init_sigma_(torch.empty(num_blocks, num_blocks, rank), "exp_norm")
    Sigma = to_effective(fresh, "exp_norm")
    raw = to_raw(Sigma, "exp_norm")
    torch.testing.assert_close(to_effective(raw, "exp_norm"), Sigma, rtol=1e-6, atol=0)
    assert raw.abs().mean().item() == pytest.approx(0.5 / (num_blocks * rank) ** 0.5, rel=1e-6)
    torch.testing.assert_close(raw / raw.norm(), fresh / fresh.norm(), rtol=1e-5, atol=1e-7)


def test_raw_sigma_takes_values_that_travelled_in_bfloat16() -> None:
    torch.manual_seed(0)
    Sigma = to_effective(torch.randn(4, 4, 8), "exp_norm")
    raw = to_raw(Sigma.bfloat16().float(), "exp_norm")
    torch.testing.assert_close(to_effective(raw, "exp_norm"), Sigma, rtol=2**-7, atol=0)


def test_values_outside_the_range_of_exp_norm_are_refused() -> None:
    with pytest.raises(ValueError, match="not positive"):
        to_raw(torch.tensor([[[1.0, -1.0]]]), "exp_norm")
    mean = (to_effective(torch.randn(2, 2, 4), "exp_norm") + to_effective(torch.randn(2, 2, 4), "exp_norm")) / 2
    with pytest.raises(ValueError, match="gauge"):
        to_raw(mean, "exp_norm")
    with pytest.raises(ValueError, match="sigma_transform='log' is unknown"):
        to_effective(mean, "log")
    with pytest.raises(ValueError, match="sigma_transform='log' is unknown"):
        to_raw(mean, "log")


def test_start_of_sigma() -> None:
    torch.manual_seed(0)
    assert torch.equal(init_sigma_(torch.empty(1, 1, 8), "identity"), torch.ones(1, 1, 8))
    assert torch.equal(init_sigma_(torch.empty(4, 4, 8), "identity", "ones"), torch.ones(4, 4, 8))
    for transform in ("identity", "exp_norm"):
        log_sigma = to_effective(init_sigma_(torch.empty(16, 16, 64), transform), transform).log()
        assert log_sigma.abs().mean().item() == pytest.approx(1, rel=1e-5)
        assert log_sigma.abs().max().item() == pytest.approx(2, rel=0.05)  # uniform on (-2, 2)
        assert log_sigma.std().item() == pytest.approx(2 / 3**0.5, rel=0.05)
