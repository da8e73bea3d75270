import dataclasses

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from bora_fl.adapters import BoraConfig
from bora_fl.adapters.state import named_layers, read_factors, write_factors
from bora_fl.blocks import BlockFactors


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(12, 18), nn.Tanh(), nn.Linear(18, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def adapted(transform: str = "exp_norm", **settings: object) -> nn.Module:
    torch.manual_seed(0)
    config = BoraConfig(r=4, num_blocks=3, target_modules=["0", "2"], sigma_transform=transform, init_weights=False)
    for name, value in settings.items():
        setattr(config, name, value)
    return get_peft_model(Nested(), config)


def test_layers_carry_their_names_in_the_base_model() -> None:
    model = adapted()
    expected = ["inner.0", "inner.2"]
    assert [name for name, _ in named_layers(model)] == expected
    assert [name for name, _ in named_layers(model.base_model)] == expected
    assert [
        name for name, _ in named_layers(inject_adapter_in_model(model.peft_config["default"], Nested()))
    ] == expected
    model.add_adapter("last", BoraConfig(num_blocks=2, target_modules=["2"]))
    assert list(read_factors(model, "last")) == ["inner.2"]


@pytest.mark.parametrize("transform", ["exp_norm", "identity"])
def test_factors_are_the_updates_of_the_layers(transform: str) -> None:
    model = adapted(transform)
    for name, layer in named_layers(model):
        torch.testing.assert_close(
            read_factors(model)[name].dense(), layer.get_delta_weight("default"), rtol=1e-6, atol=1e-7
        )


def test_reading_copies() -> None:
    model = adapted()
    before = read_factors(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert not torch.equal(read_factors(model)["inner.0"].A, before["inner.0"].A)


@pytest.mark.parametrize("transform", ["exp_norm", "identity"])
def test_writing_what_was_read_restores_the_model(transform: str) -> None:
    model, other = adapted(transform), adapted(transform)
    factors = read_factors(model)
    with torch.no_grad():
        for _, layer in named_layers(other):
            for parameter in layer.adapter("default").parameters():
                parameter.normal_()
    written = {id(p) for p in other.parameters()}
    write_factors(other, factors)
    assert {id(p) for p in other.parameters()} == written
    for name, again in read_factors(other).items():
        assert torch.equal(again.A, factors[name].A)
        assert torch.equal(again.B, factors[name].B)
        torch.testing.assert_close(again.sigma, factors[name].sigma, rtol=1e-6, atol=0)
    x = torch.randn(5, 12)
    torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-5)


def test_another_scaling_goes_into_b() -> None:
    model = adapted()
    factors = {name: dataclasses.replace(f, scaling=3 * f.scaling) for name, f in read_factors(model).items()}
    write_factors(model, factors)
    for name, again in read_factors(model).items():
        torch.testing.assert_close(again.dense(), factors[name].dense(), rtol=1e-5, atol=1e-6)


def damaged(name: str, factors: dict[str, BlockFactors]) -> dict[str, BlockFactors]:
    last = factors["inner.2"]
    if name == "missing":
        return {"inner.0": factors["inner.0"]}
    if name == "unknown":
        return {**factors, "inner.7": last}
    if name == "rank":
        return {**factors, "inner.2": BlockFactors(B=last.B[:, :2], sigma=last.sigma[..., :2], A=last.A[:2])}
    return {**factors, "inner.2": dataclasses.replace(last, sigma=2 * last.sigma)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"missing \['inner.2'\], unknown \[\]"),
        ("unknown", r"missing \[\], unknown \['inner.7'\]"),
        ("rank", r"Layer 'inner.2': B has shape \[6, 2\] where the adapter has \[6, 4\]"),
        ("range", "Layer 'inner.2': mean|log Sigma|"),
    ],
)
def test_factors_that_do_not_fit_are_refused_and_nothing_is_written(damage: str, message: str) -> None:
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    factors = {name: dataclasses.replace(f, A=f.A + 1) for name, f in read_factors(model).items()}
    with pytest.raises(ValueError, match=message):
        write_factors(model, damaged(damage, factors))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_unknown_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="adapter_name='other'"):
        read_factors(adapted(), "other")
