"""Trained cores between frozen bases, against their definition computed densely in float64."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from bora_fl.adapters import RavanConfig
from bora_fl.adapters.ravan import RavanBases, RavanCores, RavanLayer
from bora_fl.blocks import BlockFactors

CASES = [(structure, heads) for structure in ("heads", "blocks") for heads in (1, 2, 6)]
every_case = pytest.mark.parametrize(("structure", "heads"), CASES)


def make(structure="heads", heads=2, rank=3, n=18, m=24, **settings) -> tuple[RavanBases, RavanCores]:
    torch.manual_seed(heads)
    bases = RavanBases(n, m, RavanConfig(r=rank, num_heads=heads, structure=structure, **settings)).double()
    cores = RavanCores(rank, heads, structure).double()
    for parameter in cores.parameters():
        nn.init.normal_(parameter)
    return bases, cores


def by_definition(adapter: RavanBases, cores: RavanCores, m: int, n: int) -> torch.Tensor:
    """The sum over heads, or the blocks one by one."""
    A, B, H, s = adapter.right, adapter.left, cores.H.detach(), cores.scales.detach()
    total = torch.zeros(m, n, dtype=torch.float64)
    if adapter.structure == "heads":
        for h in range(len(H)):
            total += s[h] * B[h] @ H[h] @ A[h]
        return adapter.scaling * total
    b = len(H)
    for i in range(b):
        for j in range(b):
            block = s[i, j] * B[i] @ H[i, j] @ A[j]
            total[i * m // b : (i + 1) * m // b, j * n // b : (j + 1) * n // b] = block
    return adapter.scaling * total


@every_case
@pytest.mark.parametrize("shape", [(), (4,), (2, 5)])
def test_forward_and_delta_are_the_sum_over_heads(structure, heads, shape):
    bases, cores = make(structure, heads, ravan_alpha=6.0)
    wanted = by_definition(bases, cores, 24, 18)
    torch.testing.assert_close(bases.delta(cores), wanted, rtol=1e-12, atol=1e-12)
    x = torch.randn(*shape, 18, dtype=torch.float64)
    torch.testing.assert_close(bases(x, cores), x @ wanted.T, rtol=1e-12, atol=1e-12)


@every_case
def test_orthonormal_bases_keep_the_norm_of_the_cores(structure, heads):
    bases, cores = make(structure, heads)  # 6 heads of rank 3 fill all 18 columns
    wanted = bases.scaling * cores.scaled().norm()
    torch.testing.assert_close(bases.delta(cores).norm(), wanted, rtol=1e-6, atol=0)


def test_more_heads_than_directions_are_orthonormal_each_on_its_own():
    bases, _ = make("heads", 7)
    eye = torch.eye(3, dtype=torch.float64).expand(7, 3, 3)
    torch.testing.assert_close(bases.right @ bases.right.mT, eye, rtol=0, atol=1e-6)
    torch.testing.assert_close(bases.left.mT @ bases.left, eye, rtol=0, atol=1e-6)


def test_diagonal_cores_are_block_factors():
    bases, cores = make("blocks", 3)
    with torch.no_grad():
        cores.H.copy_(torch.diag_embed(cores.H.diagonal(dim1=-2, dim2=-1)))
    sigma = cores.scaled().detach().diagonal(dim1=-2, dim2=-1)
    B, A = bases.left.reshape(24, 3), bases.right.permute(1, 0, 2).reshape(3, 18)
    torch.testing.assert_close(bases.delta(cores), BlockFactors(B, sigma, A, bases.scaling).dense())


@every_case
def test_gradients_are_those_of_finite_differences(structure, heads):
    bases, cores = make(structure, heads)
    x = torch.randn(2, 18, dtype=torch.float64, requires_grad=True)

    def run(x, H, scales):
        return bases(x, lambda u: torch.func.functional_call(cores, {"H": H, "scales": scales}, (u,)))

    assert torch.autograd.gradcheck(run, (x, cores.H, cores.scales), fast_mode=True)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 18), Conv1D(8, 18)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted(structure="heads", **settings) -> tuple[Small, PeftModel]:
    torch.manual_seed(0)
    base = Small()
    config = RavanConfig(r=2, num_heads=2, structure=structure, target_modules=["first", "second"], **settings)
    return base, get_peft_model(base, config)


def drawn(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))


@pytest.mark.parametrize("structure", ["heads", "blocks"])
def test_an_adapted_model_starts_as_its_base_and_trains_cores_alone(structure):
    torch.manual_seed(0)
    x = torch.randn(3, 12)
    _, model = adapted(structure)
    with model.disable_adapter():
        wanted = model(x)
    assert torch.equal(model(x), wanted)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"H", "scales"}


@pytest.mark.parametrize("structure", ["heads", "blocks"])
def test_merged_unmerged_saved_and_loaded_it_computes_the_same(structure, tmp_path):
    x = torch.randn(3, 12)
    _, model = adapted(structure)
    plain = model(x).detach()
    drawn(model)
    wanted = model(x).detach()
    assert (wanted - plain).abs().max() > 0.1
    model.save_pretrained(str(tmp_path))
    names = {name.rpartition(".ravan_")[2] for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert names == {"bases.right", "bases.left", "cores.H", "cores.scales"}
    torch.manual_seed(0)
    fresh = Small()
    torch.manual_seed(5)  # the bases come from the file
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path))
    torch.testing.assert_close(loaded(x), wanted)
    model.merge_adapter()
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("structure", ["heads", "blocks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_over_a_base_of_another_dtype_the_adapter_computes_in_float32_at_least(structure, dtype):
    torch.manual_seed(0)
    base = Small().to(dtype)
    model = get_peft_model(base, RavanConfig(r=2, num_heads=2, structure=structure, target_modules=["first", "second"]))
    drawn(model)
    x = torch.randn(3, 12, dtype=dtype)
    layer = base.first
    branch = layer.bases("default")(x, layer.cores("default"))
    exact = x.double() @ layer.delta("default").double().T
    torch.testing.assert_close(branch.double(), exact, rtol=1e-5, atol=1e-6)
    flat = layer.bases("default").left.double()[0]
    torch.testing.assert_close(flat.T @ flat, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-6)
    wanted = base.first.base_layer(x).double() + exact
    torch.testing.assert_close(base.first(x), wanted.to(dtype), rtol=2e-2, atol=2e-2)
    assert model(x).dtype == dtype
    model.to(dtype)  # all of it
    assert model(x).dtype == dtype


def test_two_adapters_have_bases_of_their_own():
    _, model = adapted()
    model.add_adapter("other", RavanConfig(r=3, num_heads=1, target_modules=["first"]))
    layer = next(m for m in model.modules() if isinstance(m, RavanLayer))
    assert layer.bases("other").right.shape == (1, 3, 12)
    assert not any(p.requires_grad for p in layer.cores("other").parameters())
    model.set_adapter("other")
    assert all(p.requires_grad for p in layer.cores("other").parameters())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 0}, "r=0"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"structure": "tails"}, "structure='tails'.*heads, blocks"),
        ({"ravan_alpha": 0.0}, r"ravan_alpha=0\.0"),
        ({"ravan_dropout": 1.0}, r"ravan_dropout=1\.0"),
    ],
)
def test_a_wrong_setting_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        RavanConfig(**settings)


def test_what_does_not_fit_a_layer_is_refused():
    with pytest.raises(ValueError, match=r"num_heads=5 blocks must divide 24 rows and 18 columns"):
        make("blocks", 5)
    with pytest.raises(ValueError, match=r"r=4 with bases of 4 rows and 3 columns; use at most 3"):
        make("blocks", 6, rank=4)
    with pytest.raises(TypeError, match=r"'0' is a Embedding"):
        get_peft_model(nn.Sequential(nn.Embedding(3, 4)), RavanConfig(r=1, num_heads=1, target_modules=["0"]))
    _, model = adapted()
    with pytest.raises(ValueError, match="adapter_names"):
        next(m for m in model.modules() if isinstance(m, RavanLayer))(torch.randn(1, 12), adapter_names=["default"])
