import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from bora_fl.kernels import cpu, cpu_chunked
from bora_fl.kernels.dispatch import bora_linear, explain
from bora_fl.kernels.reference import bora_branch_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
NAMES = ("x", "A", "Sigma", "B")


def draw(T: int, b: int, p: int, q: int, r: int, x_dtype: torch.dtype, factor_dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(T + p + q)
    n, m = b * p, b * q
    shapes = {"x": (T, n), "W": (m, n), "bias": (m,), "dy": (T, m), "A": (r, n), "Sigma": (b, b, r), "B": (m, r)}
    return {
        name: torch.randn(*shape, generator=generator).to(factor_dtype if name in NAMES[1:] else x_dtype)
        for name, shape in shapes.items()
    }


def outputs(function, tensors: dict[str, Tensor], wanted: tuple[str, ...] = NAMES, **options) -> dict[str, Tensor]:
    leaves = {name: tensors[name].detach().requires_grad_(name in wanted) for name in NAMES}
    y = function(*leaves.values(), 0.5, **options)
    grads = torch.autograd.grad(y, [leaves[name] for name in wanted], tensors["dy"])
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def by_reference(x, A, Sigma, B, scaling, base_weight=None, base_bias=None, **options) -> Tensor:
    y = bora_branch_reference(x, A, Sigma, B, scaling, **options)
    return y if base_weight is None else y + functional.linear(x, base_weight, base_bias)


def check(T, b, p, q, r, dtypes, base: bool, dropout_p: float) -> None:
    tensors = draw(T, b, p, q, r, *dtypes)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    options = {"dropout_p": dropout_p, "seed": torch.tensor(5) if dropout_p else None}
    layer = {"base_weight": tensors["W"], "base_bias": tensors["bias"]} if base else {}
    wide_layer = {"base_weight": wide["W"], "base_bias": wide["bias"]} if base else {}
    found = outputs(bora_linear, tensors, **layer, **options)
    expected = outputs(by_reference, wide, **wide_layer, **options)
    for name, value in found.items():
        assert value.dtype == tensors["x" if name == "y" else name].dtype
        error = float((value.double() - expected[name]).norm() / expected[name].norm().clamp_min(1e-30))
        assert error < TOLERANCE[value.dtype], f"{name}: {error:.1e}"
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), f"{name} was modified"


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 3, 5, 4), (33, 2, 7, 9, 5), (700, 4, 16, 3, 8)], ids=str)
def test_agrees_with_float64(shape, dtypes, base: bool, dropout_p: float) -> None:
    check(*shape, dtypes, base, dropout_p)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    T=st.integers(1, 200),
    b=st.sampled_from([1, 2, 3, 4, 8, 32]),
    p=st.integers(4, 20),  # a gradient of one or two elements may cancel to nothing: no error is small then
    q=st.integers(4, 20),
    r=st.integers(2, 20),
    dtypes=st.sampled_from(DTYPES),
    base=st.booleans(),
)
def test_agrees_with_float64_for_any_shape(T: int, b: int, p: int, q: int, r: int, dtypes, base: bool) -> None:
    check(T, b, p, q, r, dtypes, base, 0.0)


def test_several_chunks_of_tokens_agree_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_chunked, "CHUNK_BYTES", 1)
    monkeypatch.setattr(cpu, "prefers_expanded", lambda *_: False)
    for dtypes in DTYPES:
        check(200, 2, 7, 9, 5, dtypes, True, 0.3)


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("expanded", [True, False])
def test_both_forms_of_the_small_products_agree_with_float64(
    expanded: bool, base: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "prefers_expanded", lambda x, A, *_: expanded and x.dtype == A.dtype)
    for dtypes in DTYPES:
        check(70, 4, 7, 9, 5, dtypes, base, 0.0)


def test_many_tokens_take_the_merged_weight_and_few_do_not() -> None:
    few, many = draw(4, 2, 8, 8, 3, *DTYPES[1]), draw(64, 2, 8, 8, 3, *DTYPES[1])
    half = draw(64, 2, 8, 8, 3, *DTYPES[3])
    taken = [cpu.prefers_merged(t["x"], t["A"], t["B"], t["W"], None) for t in (few, many, half)]
    assert taken == [False, True, False]


@pytest.mark.parametrize("T", [5, 300])
@pytest.mark.parametrize("wanted", [("x",), ("A",), ("Sigma",), ("B",), ("x", "B"), ("A", "Sigma")], ids=str)
def test_gradients_asked_for_alone_equal_those_asked_for_together(wanted: tuple[str, ...], T: int) -> None:
    tensors = draw(T, 4, 8, 6, 3, *DTYPES[1])
    layer = {"base_weight": tensors["W"], "base_bias": tensors["bias"]}
    together, alone = outputs(bora_linear, tensors, **layer), outputs(bora_linear, tensors, wanted, **layer)
    for name in ("y", *wanted):
        assert torch.equal(alone[name], together[name]), name


@pytest.mark.parametrize("dtypes", DTYPES[1:], ids=str)
def test_repeat_runs_are_bitwise_equal(dtypes) -> None:
    tensors = draw(300, 4, 8, 6, 3, *dtypes)
    options = {"base_weight": tensors["W"], "dropout_p": 0.2, "seed": torch.tensor(9)}
    first, second = outputs(bora_linear, tensors, **options), outputs(bora_linear, tensors, **options)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_no_tokens_give_zero_gradients() -> None:
    tensors = draw(0, 2, 4, 4, 3, *DTYPES[1])
    found = outputs(bora_linear, tensors, base_weight=tensors["W"], base_bias=tensors["bias"])
    assert found["y"].shape == (0, 8)
    assert not any(found[name].any() for name in NAMES[1:])


def test_leading_dimensions_and_strided_x_are_kept() -> None:
    tensors = draw(24, 2, 4, 4, 3, *DTYPES[0])
    factors = [tensors[name] for name in NAMES[1:]]
    x = tensors["x"].view(2, 3, 4, 8)
    expected = bora_linear(tensors["x"], *factors, 0.5, base_weight=tensors["W"])
    assert torch.equal(bora_linear(x, *factors, 0.5, base_weight=tensors["W"]), expected.view(2, 3, 4, 8))
    padded = torch.cat([tensors["x"], tensors["x"]], 1)[:, :8]
    assert explain(padded, *factors).path == "cpu"
    torch.testing.assert_close(bora_linear(padded, *factors, 0.5, base_weight=tensors["W"]), expected)
    across = tensors["x"].T.contiguous().T
    torch.testing.assert_close(bora_linear(across, *factors, 0.5), bora_linear(tensors["x"], *factors, 0.5))


def test_saves_x_and_nothing_else() -> None:
    tensors = draw(64, 2, 8, 8, 3, *DTYPES[1])
    tensors["B"].requires_grad_()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        bora_linear(*(tensors[name] for name in NAMES), 0.5, base_weight=tensors["W"])
    places = {tensor.data_ptr() for tensor in tensors.values()}
    assert tensors["x"].data_ptr() in {tensor.data_ptr() for tensor in saved}
    assert sum(tensor.nbytes for tensor in saved if tensor.data_ptr() not in places) == 0
