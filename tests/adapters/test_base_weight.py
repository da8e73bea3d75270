import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bora_fl.adapters import BoraConfig
from bora_fl.adapters.base_weight import add_to_base, as_stored, restore_base, save_base


def layer_over(base: nn.Module, method: str = "bora"):
    targets = {"target_modules": ["0"], "r": 2}
    conv1d = isinstance(base, Conv1D)
    config = BoraConfig(num_blocks=2, **targets) if method == "bora" else LoraConfig(fan_in_fan_out=conv1d, **targets)
    return get_peft_model(nn.Sequential(base), config).base_model.model[0]


@pytest.mark.parametrize("method", ["bora", "lora"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 4), (4, 6)])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_outputs_move_by_the_delta(method: str, shape: tuple[int, int], kind: str) -> None:
    torch.manual_seed(0)
    m, n = shape
    layer = layer_over((Conv1D(m, n) if kind == "conv1d" else nn.Linear(n, m)).double(), method)
    x, delta = torch.randn(3, n, dtype=torch.float64), torch.randn(m, n, dtype=torch.float64)
    before, saved = layer(x), save_base(layer)
    add_to_base(layer, delta)
    torch.testing.assert_close(layer(x), before + x @ delta.T)
    with pytest.raises(ValueError, match=r"a delta lies as \[\d+, 9\]|a delta lies as \[9, \d+\]"):
        add_to_base(layer, torch.zeros(m, 9))
    restore_base(layer, saved)
    assert torch.equal(layer(x), before)


def test_a_sum_is_rounded_once() -> None:
    layer = layer_over(nn.Linear(4, 6).bfloat16())
    with torch.no_grad():
        layer.weight.fill_(1.0)
    delta = torch.full((6, 4), 2.0**-8 + 2.0**-17)  # half a step of bfloat16 at 1, and a little: rounds up, once
    assert delta.bfloat16().eq(2.0**-8).all()  # rounded first, it would then be lost to rounding to even
    add_to_base(layer, delta)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.eq(1 + 2.0**-7).all()


def test_a_sum_that_is_not_finite_leaves_the_weight() -> None:
    layer = layer_over(nn.Linear(4, 6))
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="NaNs"):
        add_to_base(layer, torch.full((6, 4), float("inf")), finite=True)
    assert torch.equal(layer.weight, before)


class Rounded(QuantizationBackend):
    """Weights in steps of a quarter, in a parameter that is replaced at every write, as bitsandbytes does."""

    layer_type, supports_merge, backend_name = "linear", True, "quarters"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        return base_layer.weight / 4

    def set_base_weight(self, peft_layer, weight_data: Tensor) -> None:
        base = peft_layer.get_base_layer()
        base.weight = nn.Parameter((weight_data * 4).round(), requires_grad=False)


@pytest.mark.parametrize("method", ["bora", "lora"])
def test_a_quantized_weight_goes_through_its_backend_and_comes_back_bit_by_bit(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_over(nn.Linear(4, 4), method)
    monkeypatch.setattr("bora_fl.adapters.base_weight.resolve_quantization_backend", lambda *_, **__: Rounded())
    if method == "bora":
        layer.quantization_backend = Rounded()
    layer.get_base_layer().weight = nn.Parameter(torch.arange(16.0).view(4, 4), requires_grad=False)
    saved = save_base(layer)
    for _ in range(2):
        add_to_base(layer, torch.full((4, 4), 0.3))
        assert torch.equal(layer.weight, torch.arange(1.0, 17.0).view(4, 4))
        restore_base(layer, saved)
        assert torch.equal(layer.weight, torch.arange(16.0).view(4, 4))


def test_what_cannot_be_written_is_refused() -> None:
    layer = layer_over(nn.Linear(4, 4))
    layer.quantization_backend = ForwardOnlyQuantizationBackend("gptq")
    with pytest.raises(TypeError, match="quantized by gptq, which cannot write weights"):
        add_to_base(layer, torch.zeros(4, 4))
    with pytest.raises(TypeError, match="offloaded"):
        add_to_base(layer_over(nn.Linear(4, 4, device="meta")), torch.zeros(4, 4))


def test_the_stored_layout_is_the_layers() -> None:
    delta = torch.randn(6, 4)
    assert torch.equal(as_stored(layer_over(Conv1D(6, 4)), delta), delta.T)
    assert torch.equal(as_stored(layer_over(nn.Linear(4, 6)), delta), delta)
