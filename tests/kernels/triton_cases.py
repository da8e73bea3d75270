"""The Triton kernels against float64: on a GPU where there is one, else in Triton's interpreter.

Not collected by name: interpreting and compiling need two processes, so `test_triton.py` runs this file in one of its
own, and `bora_fl.kernels.gpu_check` runs it on a GPU.
"""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it for deterministic algorithms

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from bora_fl.kernels import expanded, reference, triton_launch  # noqa: E402 - Triton reads the environment when it is imported
from bora_fl.kernels.dispatch import bora_linear  # noqa: E402 - Triton reads the environment when it is imported
from bora_fl.kernels.dropout import keep_mask  # noqa: E402 - Triton reads the environment when it is imported
from bora_fl.kernels.reference import Gradients, Needs  # noqa: E402 - Triton reads the environment when it is imported

DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16/fp32": (torch.float16, torch.float32),
    "bf16/fp32": (torch.bfloat16, torch.float32),
}
# Relative Frobenius error by the dtype that limits it. Float32 factors over a half-precision x are multiplied in TF32.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
TF32_TOLERANCE = 2e-3
Path = Callable[["Case", dict[str, Tensor], Needs], tuple[Tensor, Gradients]]


@dataclass(frozen=True)
class Case:
    T: int
    p: int
    q: int
    b: int
    r: int
    dtype: str = "fp32"
    dropout_p: float = 0.0
    base: bool = True
    strided: bool = False
    seed: int = 0


def draw_cases(count: int) -> list[Case]:
    """Draw odd shapes; small numbers of blocks are drawn more often, because the interpreter is slow."""
    draw = random.Random(20240607)
    cases = []
    for index in range(count):
        b = draw.choice([1, 1, 2, 2, 2, 4, 4, 8])
        cases.append(
            Case(
                T=draw.choice([1, 2, 7, 17, 33, 63, 65]),
                p=draw.choice([3, 7, 9, 16, 31, 33]),
                q=draw.choice([3, 5, 11, 16, 31, 35]),
                b=b,
                r=draw.choice([4, 5, 8, 12, 16, 17, 33]),
                dtype=list(DTYPES)[index % len(DTYPES)],
                dropout_p=0.3 if b <= 4 and index % 3 == 0 else 0.0,
                base=index % 4 != 1,
                strided=index % 5 == 2,
                seed=index,
            )
        )
    return cases


SPECIAL = [
    Case(T=150, p=70, q=130, b=1, r=16),  # several tiles of every dimension
    Case(T=140, p=72, q=65, b=2, r=4, dtype="bf16", dropout_p=0.5),
    Case(T=600, p=16, q=16, b=32, r=4, dtype="fp16")
    if DEVICE == "cuda"
    else Case(T=5, p=4, q=4, b=32, r=4, dtype="fp16"),
    Case(T=9, p=5, q=3, b=16, r=7),
    Case(T=3, p=17, q=16, b=1, r=128, dtype="bf16/fp32"),
    Case(T=20, p=8, q=8, b=2, r=64, dtype="bf16"),
]


on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter compiles nothing")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill every new tensor with NaN, so that an output or a slice that is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def tensors(case: Case) -> dict[str, Tensor]:
    x_dtype, factor_dtype = DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(case.seed)
    n, m = case.b * case.p, case.b * case.q

    def normal(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    x = normal(x_dtype, case.T, n + 3)[:, :n] if case.strided else normal(x_dtype, case.T, n)
    return {
        "x": x,
        "A": normal(factor_dtype, case.r, n),
        "Sigma": normal(factor_dtype, case.b, case.b, case.r),
        "B": normal(factor_dtype, m, case.r),
        "dy": normal(x_dtype, case.T, m),
        "W": normal(x_dtype, m, n),
        "bias": normal(x_dtype, m),
    }


def run(case: Case, given: dict[str, Tensor], needs: Needs) -> tuple[Tensor, Gradients]:
    weight, bias = (given["W"], given["bias"]) if case.base else (None, None)
    seed = torch.tensor(2**40 + case.seed, device=DEVICE) if case.dropout_p else None
    factors = given["A"], given["Sigma"], given["B"]
    y, u = triton_launch.forward(given["x"], *factors, 0.5, weight, bias, case.dropout_p, seed)
    grads = triton_launch.backward(given["dy"], given["x"], u, *factors, 0.5, weight, case.dropout_p, seed, needs)
    return y, grads


def run_expanded(case: Case, given: dict[str, Tensor], needs: Needs) -> tuple[Tensor, Gradients]:
    weight, bias = (given["W"], given["bias"]) if case.base else (None, None)
    factors = given["A"], given["Sigma"], given["B"]
    y, u = expanded.forward(given["x"], *factors, 0.5, weight, bias)
    return y, expanded.backward(given["dy"], given["x"], u, *factors, 0.5, weight, needs)


def oracle(case: Case, given: dict[str, Tensor]) -> dict[str, Tensor]:
    wide = {name: tensor.double().cpu() for name, tensor in given.items()}
    x, factors = wide["x"], (wide["A"], wide["Sigma"], wide["B"])
    keep = keep_mask(case.T, x.shape[1], case.dropout_p, torch.tensor(2**40 + case.seed)) if case.dropout_p else None
    dropped = reference.apply_dropout(x, keep, case.dropout_p)
    y, u = reference.branch_forward(dropped, *factors, 0.5)
    grads = reference.branch_backward(wide["dy"], dropped, u, *factors, 0.5)
    assert grads.x is not None
    dx = reference.apply_dropout(grads.x, keep, case.dropout_p)
    if case.base:
        y, dx = y + x @ wide["W"].T + wide["bias"], dx + wide["dy"] @ wide["W"]
    return {"y": y, "x": dx, "A": grads.A, "Sigma": grads.Sigma, "B": grads.B}  # type: ignore[dict-item]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double().cpu() - expected).norm() / expected.norm())


def check(case: Case, path: Path = run) -> None:
    given = tensors(case)
    before = {name: tensor.clone() for name, tensor in given.items()}
    y, grads = path(case, given, Needs())
    expected = oracle(case, given)
    mixed = case.dtype.endswith("/fp32")
    for name, found in {"y": y, **grads._asdict()}.items():
        assert found is not None
        tolerance = TF32_TOLERANCE if mixed and found.dtype == torch.float32 else TOLERANCE[found.dtype]
        error = relative_error(found, expected[name])
        assert error < tolerance, f"{name}: relative error {error:.2e} above {tolerance} for {case}"
    for name, tensor in given.items():
        assert torch.equal(tensor, before[name]), f"{name} was modified"


@pytest.mark.parametrize("case", [*draw_cases(60), *SPECIAL], ids=str)
def test_agrees_with_float64(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    [case for case in (*draw_cases(60), *SPECIAL) if "/" not in case.dtype and not case.dropout_p],
    ids=str,
)
def test_dense_products_agree_with_float64(case: Case) -> None:
    check(case, run_expanded)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    T=st.integers(1, 70),
    p=st.integers(4, 40),  # a gradient of one or two elements may cancel to nothing: no error is small then
    q=st.integers(4, 40),
    b=st.sampled_from([1, 2, 4]),
    r=st.integers(2, 40),
    dtype=st.sampled_from(list(DTYPES)),
    base=st.booleans(),
)
def test_agrees_with_float64_for_any_shape(T: int, p: int, q: int, b: int, r: int, dtype: str, base: bool) -> None:
    check(Case(T, p, q, b, r, dtype, base=base))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_repeat_runs_are_bitwise_equal(dtype: str) -> None:
    case = Case(T=130, p=9, q=10, b=2, r=5, dtype=dtype, dropout_p=0.2)
    given = tensors(case)
    first, second = run(case, given, Needs()), run(case, given, Needs())
    assert torch.equal(first[0], second[0])
    for name, a, b in zip(Gradients._fields, first[1], second[1], strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("path", [run, run_expanded])
@pytest.mark.parametrize("wanted", Gradients._fields)
def test_gradients_asked_for_alone_equal_those_asked_for_together(wanted: str, path: Path) -> None:
    case = Case(T=21, p=9, q=10, b=2, r=5, dropout_p=0.2 if path is run else 0.0)
    given = tensors(case)
    together = path(case, given, Needs())[1]._asdict()
    alone = path(case, given, Needs(**{name: name == wanted for name in Gradients._fields}))[1]._asdict()
    assert torch.equal(alone.pop(wanted), together[wanted])
    assert all(gradient is None for gradient in alone.values())


@pytest.mark.filterwarnings(
    "ignore:Attempting to run cuBLAS:UserWarning"
)  # torch's own thread, in a first backward pass
@pytest.mark.parametrize("path", ["triton", "expanded"])
def test_bora_linear_takes_the_path_eager_compiled_and_checkpointed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BORA_KERNEL", path)
    dropout_p = 0.2 if path == "triton" else 0.0
    given = {
        name: tensor.requires_grad_(name in ["x", "A", "Sigma", "B"])
        for name, tensor in tensors(Case(9, 8, 8, 2, 4)).items()
    }

    def layer(x: Tensor) -> Tensor:
        factors = given["A"], given["Sigma"], given["B"]
        return bora_linear(x, *factors, 0.5, base_weight=given["W"], base_bias=given["bias"], dropout_p=dropout_p)

    def gradients(function) -> list[Tensor]:
        torch.manual_seed(7)
        y = function(given["x"])
        return [y, *torch.autograd.grad(y, [given[name] for name in ("x", "A", "Sigma", "B")], given["dy"])]

    eager = gradients(layer)
    checkpointed = gradients(lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False))
    compiled = gradients(torch.compile(layer, backend="aot_eager", fullgraph=True))
    for a, b, c in zip(eager, checkpointed, compiled, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, a, rtol=0 if path == "triton" else 2e-6, atol=0 if path == "triton" else 2e-6)


@pytest.mark.parametrize(
    ("case", "path"),
    [
        (Case(9, 8, 8, 2, 4), "triton"),
        (Case(9, 8, 4, 1, 4, dropout_p=0.3, base=False), "triton"),
        (Case(9, 8, 8, 2, 4), "expanded"),
        (Case(9, 8, 4, 1, 4, base=False, strided=True), "expanded"),
    ],
)
def test_both_operators_pass_torchs_own_checks(case: Case, path: str) -> None:
    given = tensors(case)
    weight = given["W"] if case.base else None
    seed = torch.tensor(5, device=DEVICE) if case.dropout_p else None
    rest = (weight, None, seed, 0.5, case.dropout_p, path)
    inputs = [given[name] for name in ("x", "A", "Sigma", "B")]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.bora_fl.layer.default, (*inputs, *rest), test_utils=checks)
    _, u = torch.ops.bora_fl.layer(*inputs, *rest)
    for needs in ([True, True, True, True], [False, False, True, False]):
        arguments = (given["dy"], u, *inputs, *rest, needs)
        torch.library.opcheck(torch.ops.bora_fl.layer_backward.default, arguments, test_utils=checks)


@pytest.mark.parametrize("path", [run, run_expanded])
def test_no_tokens_give_zero_gradients(path: Path) -> None:
    case = Case(T=0, p=4, q=4, b=2, r=4)
    y, grads = path(case, tensors(case), Needs())
    assert y.shape == (0, 8)
    assert grads.x is not None
    assert grads.x.shape == (0, 8)
    assert not any(gradient.any() for gradient in grads[1:])


@on_gpu
def test_a_launch_repeated_without_triton_look_up_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Aligned and unaligned tensors, other numbers of tokens: each takes what was compiled for it."""
    triton_launch._compiled.clear()
    for tokens in (33, 150, 33):
        for strided in (False, True, False):
            check(Case(T=tokens, p=9, q=16, b=2, r=5, strided=strided))
    known = len(triton_launch._compiled)
    check(Case(T=70, p=9, q=16, b=2, r=5))
    assert len(triton_launch._compiled) == known
