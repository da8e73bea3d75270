import logging
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn import functional

from bora_fl.adapters import BoraConfig
from bora_fl.kernels import cpu, dispatch
from bora_fl.kernels.dispatch import bora_linear, explain

FACTORS = ("A", "Sigma", "B")


def draw(T: int = 6, b: int = 2, p: int = 4, q: int = 4, r: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    n, m = b * p, b * q
    shapes = {"x": (T, n), "A": (r, n), "Sigma": (b, b, r), "B": (m, r), "W": (m, n), "dy": (T, m)}
    return {
        name: torch.randn(*shape, generator=generator).requires_grad_(name in ("x", *FACTORS))
        for name, shape in shapes.items()
    }


def call(tensors: dict[str, Tensor], **options) -> Tensor:
    return bora_linear(tensors["x"], *(tensors[name] for name in FACTORS), 0.5, **options)


def gradients(tensors: dict[str, Tensor], y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, [tensors[name] for name in ("x", *FACTORS)], tensors["dy"].to(y.dtype))


def test_cpu_tensors_take_the_cpu_path_and_the_explanation_says_why_not_the_others() -> None:
    tensors = draw()
    found = explain(*(tensors[name] for name in ("x", *FACTORS)))
    assert found.path == "cpu"
    assert set(found.refused) == {"expanded", "triton"}
    assert "not triton" in str(found)


def test_environment_overrides_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = draw()
    inputs = [tensors[name] for name in ("x", *FACTORS)]
    monkeypatch.setenv("BORA_KERNEL", "reference")
    found = explain(*inputs)
    assert found.path == "reference"
    assert found.refused["cpu"] == "BORA_KERNEL=reference"
    monkeypatch.setenv("BORA_KERNEL", "fast")
    with pytest.raises(
        ValueError, match="BORA_KERNEL='fast' names no path: use auto, expanded, triton, cpu, reference"
    ):
        explain(*inputs)


def test_paths_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = draw(T=40)
    options = {"base_weight": tensors["W"], "dropout_p": 0.4, "seed": torch.tensor(3)}
    y = call(tensors, **options)
    monkeypatch.setenv("BORA_KERNEL", "reference")
    expected = call(tensors, **options)
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6)
    for mine, theirs in zip(gradients(tensors, y), gradients(tensors, expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5)


def test_what_no_fused_path_takes_falls_back_with_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    tensors = draw()
    tensors["W"].requires_grad_()
    dispatch._log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING, logger="bora_fl.kernels.dispatch"):
        y = call(tensors, base_weight=tensors["W"])
        call(tensors, base_weight=tensors["W"])
    assert sum("base weight is trained" in record.message for record in caplog.records) == 1
    (gradient,) = torch.autograd.grad(y, tensors["W"], tensors["dy"])
    torch.testing.assert_close(gradient, tensors["dy"].T @ tensors["x"])


@pytest.mark.parametrize("base", [True, False])
def test_autocast_gives_the_dtype_of_the_frozen_layer_and_gradients_in_the_factors_own(base: bool) -> None:
    tensors = draw(T=40)
    weight = tensors["W"] if base else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(tensors, base_weight=weight)
        assert y.dtype == functional.linear(tensors["x"], tensors["W"]).dtype == torch.bfloat16
        inside = gradients(tensors, y)
    expected = call(tensors, base_weight=weight)
    assert float(((y - expected).norm() / expected.norm()).detach()) < 1.2e-2
    for mine, theirs in zip(inside, gradients(tensors, expected), strict=True):
        assert mine.dtype == torch.float32
        assert float((mine - theirs).norm() / theirs.norm()) < 1.2e-2


def test_no_grad_equals_training_output() -> None:
    tensors = draw()
    with torch.no_grad():
        y = call(tensors, base_weight=tensors["W"])
    assert not y.requires_grad
    assert torch.equal(y, call(tensors, base_weight=tensors["W"]))


def test_manual_seed_governs_dropout() -> None:
    tensors = draw()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(call(tensors, dropout_p=0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    tensors = draw()

    def layer(x: Tensor) -> Tensor:
        factors = [tensors[name] for name in FACTORS]
        return bora_linear(x, *factors, 0.5, base_weight=tensors["W"], dropout_p=0.3)

    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)

    results = []
    for function in (layer, checkpointed):
        torch.manual_seed(4)
        for tensor in tensors.values():
            tensor.grad = None
        function(tensors["x"]).backward(tensors["dy"])
        results.append([tensors[name].grad for name in ("x", *FACTORS)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiles_into_one_graph_with_the_same_result() -> None:
    tensors = draw()

    def layer(x: Tensor, A: Tensor, Sigma: Tensor, B: Tensor) -> Tensor:
        return bora_linear(x, A, Sigma, B, 0.5, base_weight=tensors["W"], dropout_p=0.3).relu()

    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(4)
        y = function(*(tensors[name] for name in ("x", *FACTORS)))
        results.append([y, *gradients(tensors, y)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Dynamo's and Inductor's own code
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_a_compiled_training_step_equals_the_eager_one(backend: str, num_blocks: int) -> None:
    config = BoraConfig(r=3, num_blocks=num_blocks, target_modules=["0", "2"], init_weights=False)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 4)), config)
    x = torch.randn(6, 8)
    steps = []
    for forward in (model, torch.compile(model, backend=backend)):
        loss = forward(x).square().mean()
        loss.backward()
        steps.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
        model.zero_grad()
    assert len(steps[0]) == 7
    for eager, compiled in zip(*steps, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


SHAPES = {  # of every path through the CPU's products
    "expanded": {},
    "expanded, one block": {"b": 1, "T": 3},
    "expanded, merged weight": {"T": 400},
    "chunked": {"T": 150, "b": 2, "p": 200, "q": 200, "r": 300},
    "chunked, merged weight": {"T": 450, "b": 2, "p": 200, "q": 200, "r": 100},
}


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("products", SHAPES)
def test_both_operators_pass_torchs_own_checks(products: str, base: bool, dropout_p: float) -> None:
    tensors = draw(**SHAPES[products])
    x, A, Sigma, B = (tensors[name] for name in ("x", *FACTORS))
    assert cpu.prefers_expanded(x, A, Sigma, B) == products.startswith("expanded")
    assert cpu.prefers_merged(x, A, B, tensors["W"], None) == products.endswith("merged weight")
    weight = tensors["W"] if base else None
    rest = (weight, None, torch.tensor(5) if dropout_p else None, 0.5, dropout_p, "cpu")
    torch.library.opcheck(torch.ops.bora_fl.layer.default, (x, A, Sigma, B, *rest))
    _, saved = torch.ops.bora_fl.layer(x, A, Sigma, B, *rest)
    inputs = [tensor.detach() for tensor in (tensors["dy"], saved, x, A, Sigma, B)]
    for needs in ([True, True, True, True], [False, True, False, True], [False, False, True, False]):
        torch.library.opcheck(torch.ops.bora_fl.layer_backward.default, (*inputs, *rest, needs))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": (6, 9)}, "do not fit"),
        ({"Sigma": (2, 2, 4)}, "do not fit"),
        ({"Sigma": (3, 3, 3)}, "num_blocks 3 must divide in_features 8 and out_features 8"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changed: dict[str, tuple[int, ...]], message: str) -> None:
    tensors = draw() | {name: torch.zeros(shape) for name, shape in changed.items()}
    with pytest.raises(ValueError, match=message):
        call(tensors)


def test_dropout_of_everything_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dropout_p=1.0 must be in \[0, 1\)"):
        call(draw(), dropout_p=1.0)


def test_triton_is_not_taken_where_it_finds_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    full = torch.float32
    call = dispatch._Call("cuda", full, full, full, full, False, 8, 64, False, False, False, "auto")
    for there, path in ((True, "triton"), (False, "reference")):
        monkeypatch.setattr(dispatch, "_HAS_TRITON", True)
        monkeypatch.setattr(dispatch, "_HAS_COMPILER", there)
        assert dispatch._choose(call).path == path
    assert "install gcc" in dispatch._choose(call).refused["triton"]


def test_works_without_triton() -> None:
    program = """
import importlib.util
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")

sys.meta_path.insert(0, Absent())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find_spec(name, package)
import torch
from bora_fl.kernels.dispatch import bora_linear, explain
tensors = torch.randn(5, 8), torch.randn(3, 8), torch.rand(2, 2, 3), torch.randn(8, 3)
assert bora_linear(*tensors, 1.0).shape == (5, 8)
assert "not installed" in explain(*tensors).refused["triton"]
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", ["cpu", "expanded"])
def test_the_output_may_be_changed_in_place(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BORA_KERNEL", path)
    tensors = draw(T=6)
    x = tensors["x"].detach().view(2, 3, 8).requires_grad_()
    factors = [tensors[name] for name in FACTORS]
    found, expected = (bora_linear(x, *factors, 0.5, base_weight=tensors["W"]) for _ in range(2))
    assert found.shape == (2, 3, 8)
    found.mul_(2)
    inputs = [x, *factors]
    grads = (torch.autograd.grad(y.sum(), inputs) for y in (found, 2 * expected))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("changed", "path"),
    [
        ({}, "expanded"),
        ({"rank": 256}, "expanded"),
        ({"rank": 512}, "reference"),
        ({"x": torch.float32, "A": torch.float32, "B": torch.float32, "weight": torch.float32, "rank": 64}, "triton"),
        ({"A": torch.float32, "B": torch.float32}, "triton"),
        ({"dropout": True}, "triton"),
        ({"dropout": True, "num_blocks": 3}, "reference"),
        ({"weight": torch.float32}, "reference"),
        ({"trained_weight": True}, "reference"),
        ({"wanted": "triton"}, "triton"),
    ],
    ids=str,
)
def test_the_path_of_a_gpus_call(changed: dict, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_HAS_TRITON", True)
    monkeypatch.setattr(dispatch, "_HAS_COMPILER", True)
    half = torch.bfloat16
    plain = dispatch._Call("cuda", half, half, half, half, False, 8, 16, False, False, False, "auto")
    assert dispatch._choose(plain._replace(**changed)).path == path
