import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bora_fl.adapters import BoraAdapter, BoraConfig, BoraLayer

ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


def dense_update(adapter: BoraAdapter) -> Tensor:
    """Block by block from the definition, in float64."""
    A, B, sigma = (p.detach().double() for p in (adapter.A, adapter.B, adapter.sigma))
    Sigma = sigma if adapter.sigma_transform == "identity" else torch.exp(sigma / sigma.abs().mean())
    b = adapter.num_blocks
    rows, columns = B.chunk(b, 0), A.chunk(b, 1)
    blocks = [[rows[i] @ torch.diag(Sigma[i, j]) @ columns[j] for j in range(b)] for i in range(b)]
    return adapter.scaling * torch.cat([torch.cat(row, 1) for row in blocks], 0)


def adapted(base: nn.Module, **settings: object) -> tuple[BoraLayer, BoraAdapter]:
    torch.manual_seed(0)
    config = BoraConfig(**{"target_modules": ["0"], "init_weights": False, "num_blocks": 3, "r": 4, **settings})
    layer = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).base_model.model[0]
    return layer, layer.adapter("default")


@pytest.mark.parametrize("transform", ["exp_norm", "identity"])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 6])
@pytest.mark.parametrize("base", ["linear", "linear without bias", "conv1d", "linear with a hook"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_layer_is_the_base_plus_the_dense_update(
    transform: str, num_blocks: int, base: str, dtype: torch.dtype
) -> None:
    module = Conv1D(12, 18) if base == "conv1d" else nn.Linear(18, 12, bias=base != "linear without bias")
    if base == "linear with a hook":
        module.register_forward_hook(lambda *_: None)
    layer, adapter = adapted(module.to(dtype), num_blocks=num_blocks, sigma_transform=transform, use_rslora=True)
    assert adapter.A.dtype == dtype
    x = torch.randn(2, 5, 18, dtype=dtype)
    weight = layer.weight.double().T if base == "conv1d" else layer.weight.double()
    bias = None if layer.bias is None else layer.bias.double()
    expected = nn.functional.linear(x.double(), weight + dense_update(adapter), bias)
    assert relative_error(layer(x), expected) <= ROUNDING[dtype]
    delta = layer.get_delta_weight("default")
    assert relative_error(delta.T if base == "conv1d" else delta, dense_update(adapter)) <= ROUNDING[dtype]
    before = layer.weight.detach().clone()
    layer.merge(safe_merge=True)
    assert relative_error(layer(x), expected) <= ROUNDING[dtype]
    rounding = ROUNDING[dtype] * layer.weight.double().norm().item()
    layer.unmerge()
    assert (layer.weight - before).double().norm().item() <= rounding


@pytest.mark.parametrize("num_blocks", [1, 2, 4])
def test_an_adapted_layer_starts_equal_to_its_base(num_blocks: int) -> None:
    base = nn.Linear(16, 8)
    x = torch.randn(4, 16)
    expected = base(x)
    layer, adapter = adapted(base, num_blocks=num_blocks, init_weights=True)
    assert torch.equal(layer(x), expected)
    assert torch.equal(adapter.B, torch.zeros(8, 4))
    assert adapter.A.abs().max().item() == pytest.approx(16**-0.5, rel=0.1)


def test_one_block_with_sigma_one_is_peft_lora() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    shared = {"target_modules": ["0", "2"], "r": 4}
    bora = get_peft_model(
        copy.deepcopy(model), BoraConfig(num_blocks=1, bora_alpha=6, sigma_transform="identity", **shared)
    )
    lora = get_peft_model(copy.deepcopy(model), LoraConfig(lora_alpha=6, init_lora_weights=False, **shared))
    pairs = [(bora.base_model.model[i].adapter("default"), lora.base_model.model[i]) for i in (0, 2)]
    with torch.no_grad():
        for ours, theirs in pairs:
            ours.A.copy_(theirs.lora_A["default"].weight)
            ours.B.copy_(theirs.lora_B["default"].weight)
    x = torch.randn(7, 24, dtype=torch.float64)
    outputs = [m(x) for m in (bora, lora)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-13)
    for output in outputs:
        output.square().sum().backward()
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.A.grad, theirs.lora_A["default"].weight.grad, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(ours.B.grad, theirs.lora_B["default"].weight.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("num_blocks", "rank"), [(1, 3), (2, 3), (4, 2), (4, 7)])
def test_rank_and_parameter_count(num_blocks: int, rank: int) -> None:
    m, n = 24, 32
    layer, adapter = adapted(nn.Linear(n, m), num_blocks=num_blocks, r=rank)
    singular = torch.linalg.svdvals(dense_update(adapter))
    reached = int((singular > 1e-12 * singular[0]).sum())
    assert reached == min(m, n, num_blocks * rank)
    trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert trained == (m + n) * rank + num_blocks**2 * rank


def test_equal_blocks_of_sigma_keep_the_rank_of_lora() -> None:
    _, adapter = adapted(nn.Linear(32, 24), num_blocks=4, r=2, sigma_transform="identity", sigma_init="ones")
    assert int(torch.linalg.matrix_rank(dense_update(adapter))) == 2


def test_gradients_equal_those_of_the_dense_layer() -> None:
    layer, adapter = adapted(nn.Linear(18, 12).double(), num_blocks=3)
    x = torch.randn(5, 18, dtype=torch.float64, requires_grad=True)
    parameters = (x, adapter.A, adapter.sigma, adapter.B)
    weights = torch.randn(5, 12, dtype=torch.float64)
    grads = torch.autograd.grad((layer(x) * weights).sum(), parameters)
    Sigma = torch.exp(adapter.sigma / adapter.sigma.abs().mean())
    delta = torch.einsum("ipk,ijk,kjq->ipjq", adapter.B.view(3, 4, 4), Sigma, adapter.A.view(4, 3, 6)).reshape(12, 18)
    output = nn.functional.linear(x, layer.weight + adapter.scaling * delta, layer.bias)
    for name, ours, plain in zip(
        ("x", "A", "sigma", "B"), grads, torch.autograd.grad((output * weights).sum(), parameters), strict=True
    ):
        assert relative_error(ours, plain) <= 1e-12, name


class Recorder:
    """Counts the calls of a module and keeps the number of their inputs."""

    def __init__(self, module: nn.Module) -> None:
        self.inputs: list[int] = []
        module.register_forward_pre_hook(lambda _, args: self.inputs.append(len(args)))


@pytest.mark.parametrize(
    ("reason", "fused"), [("plain", True), ("hook", False), ("trained bias", False), ("subclass", False)]
)
def test_the_base_weights_go_into_the_fused_call_only_where_the_call_is_all_there_is(reason: str, fused: bool) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    base = Doubled(18, 12) if reason == "subclass" else nn.Linear(18, 12)
    layer, adapter = adapted(base, bias="bora_only" if reason == "trained bias" else "none")
    if reason == "hook":
        base.register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.randn(5, 18)
    calls = Recorder(adapter)
    expected = base(x) + nn.functional.linear(x, dense_update(adapter).float())
    assert relative_error(layer(x), expected) <= 1e-5
    assert calls.inputs == [3 if fused else 1]
    layer(x).sum().backward()
    assert (base.bias.grad is not None) == (reason == "trained bias")


def test_adapters_stay_in_float32_over_a_bfloat16_base() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(16, 8)).bfloat16(), BoraConfig(target_modules=["0"], num_blocks=2, init_weights=False)
    )
    layer = model.base_model.model[0]
    assert {p.dtype for p in layer.adapter("default").parameters()} == {torch.float32}
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    output = layer(x)
    assert output.dtype == torch.bfloat16
    weight = layer.weight.double() + dense_update(layer.adapter("default"))
    assert relative_error(output, nn.functional.linear(x.double(), weight, layer.bias.double())) <= 1.2e-2
    output.sum().backward()
    assert layer.adapter("default").B.grad.dtype == torch.float32


def test_autocast_computes_in_its_dtype() -> None:
    layer, adapter = adapted(nn.Linear(18, 12))
    x = torch.randn(5, 18)
    expected = nn.functional.linear(x.double(), layer.weight.double() + dense_update(adapter), layer.bias.double())
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    assert 1e-5 < relative_error(output, expected) <= 1.2e-2
    output.sum().backward()
    assert {p.grad.dtype for p in adapter.parameters()} == {torch.float32}


def test_dropout_acts_on_the_branch_alone_and_only_in_training() -> None:
    layer, adapter = adapted(nn.Linear(18, 12), bora_dropout=0.5)
    x = torch.randn(4000, 18).abs() + 0.1
    branch = nn.functional.linear(x, dense_update(adapter).float())
    layer.eval()
    assert relative_error(layer(x), layer.base_layer(x) + branch) <= 1e-5
    assert torch.equal(layer(x), layer(x))
    layer.train()
    dropped = layer(x) - layer.base_layer(x)
    assert relative_error(dropped, branch) > 0.1
    torch.testing.assert_close(dropped.mean(0), branch.mean(0), rtol=0.2, atol=0.02)  # unbiased


def test_merging_keeps_the_dtype_and_safe_merge_refuses_nan() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(16, 8)).bfloat16(), BoraConfig(target_modules=["0"], num_blocks=2, init_weights=False)
    )
    layer = model.base_model.model[0]
    before = layer.weight.detach().clone()
    layer.merge()
    assert layer.weight.dtype == torch.bfloat16
    assert relative_error(layer.weight, before.double() + dense_update(layer.adapter("default"))) <= 2**-8
    layer.unmerge()
    with torch.no_grad():
        layer.adapter("default").A[0, 0] = float("nan")
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="adapter default"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before)
    assert not layer.merged
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()
