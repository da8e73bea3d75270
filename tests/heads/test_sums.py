import dataclasses

import pytest
import torch

from bora_fl.heads import ClassSums
from tests.heads.problems import problem, sums_of


def test_sums_do_not_depend_on_how_examples_are_split():
    x, y = problem()
    total = ClassSums.zeros(3, 6)
    for part in torch.arange(len(x)).split([1, 250, 0, 149]):
        total = total + sums_of(x[part], y[part])
    whole = sums_of(x, y)
    for name in ("counts", "sums", "gram"):
        torch.testing.assert_close(getattr(total, name), getattr(whole, name), rtol=1e-13, atol=1e-10)


def test_sums_are_those_of_a_loop():
    x, y = problem(20)
    whole = sums_of(x, y)
    assert whole.counts.tolist() == [int((y == c).sum()) for c in range(3)]
    torch.testing.assert_close(whole.sums, torch.stack([x[y == c].sum(0) for c in range(3)]))
    torch.testing.assert_close(whole.gram, sum(torch.outer(row, row) for row in x))


def test_the_wire_holds_a_triangle_and_gives_the_sums_back():
    whole = sums_of(*problem())
    tensors = whole.to_tensors()
    assert {name: t.numel() for name, t in tensors.items()} == {"counts": 3, "sums": 18, "gram": 21}
    back = ClassSums.from_tensors(tensors, 3, 6)
    torch.testing.assert_close(back.gram, whole.gram, rtol=1e-6, atol=1e-3)
    exact = ClassSums.from_tensors(whole.to_tensors(torch.float64), 3, 6)
    torch.testing.assert_close(exact.gram, whole.gram, rtol=1e-12, atol=0)
    back.check()


@pytest.mark.parametrize("n", [1, 2, 5, 400])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_honest_sums_pass(n: int, scale: float):
    x, y = problem(n)
    ClassSums.from_tensors(sums_of(scale * x, y).to_tensors(), 3, 6).check()
    ClassSums.zeros(3, 6).check()


LIES = {
    "negative count": lambda s: {"counts": s.counts - torch.tensor([1e6, 0, 0])},
    "half an example": lambda s: {"counts": s.counts + 0.5},
    "class without examples": lambda s: {"counts": s.counts * torch.tensor([0.0, 1, 1])},
    "larger sums": lambda s: {"sums": 1.5 * s.sums},
    "fewer examples": lambda s: {"counts": (s.counts / 2).round()},
    "smaller gram": lambda s: {"gram": 0.8 * s.gram},
    "negative gram": lambda s: {"gram": -s.gram},
    "one entry": lambda s: {"gram": s.gram.index_put((torch.tensor([0, 1]), torch.tensor([1, 0])), s.gram.trace())},
}


@pytest.mark.parametrize("lie", LIES)
def test_sums_of_no_examples_are_rejected(lie: str):
    honest = sums_of(*problem())
    with pytest.raises(ValueError, match="the head's"):
        dataclasses.replace(honest, **LIES[lie](honest)).check()


@pytest.mark.parametrize("bad", ["missing", "shape", "nan", "dtype"])
def test_tensors_of_another_form_are_rejected(bad: str):
    tensors = sums_of(*problem()).to_tensors()
    if bad == "missing":
        del tensors["gram"]
    elif bad == "shape":
        tensors["gram"] = tensors["gram"][1:]
    elif bad == "dtype":  # torch cannot tell whether it is finite
        tensors["gram"] = tensors["gram"].to(torch.float8_e4m3fn)
    else:
        tensors["sums"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="the head's sums"):
        ClassSums.from_tensors(tensors, 3, 6)


def test_vectors_add_up_as_sums_do():
    x, y = problem()
    whole, parts = sums_of(x, y), [sums_of(x[:20], y[:20]), sums_of(x[20:], y[20:])]
    added = ClassSums.from_vector(parts[0].to_vector() + parts[1].to_vector(), *whole.sums.shape)
    for name in ("counts", "sums", "gram"):
        torch.testing.assert_close(getattr(added, name), getattr(whole, name))
    with pytest.raises(ValueError, match="finite ones are needed"):
        ClassSums.from_vector(whole.to_vector()[1:], *whole.sums.shape)


def several(n: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Examples that may have several of four classes, or none; nobody has the last."""
    x, _ = problem(n)
    return x, torch.stack([x[:, 0] > 0, x[:, 1] > 1, x[:, 0] > -9, x[:, 0] > 99], 1).double()


@pytest.mark.parametrize("n", [1, 2, 5, 400])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_honest_sums_of_several_classes_pass_and_come_back(n: int, scale: float):
    x, y = several(n)
    whole = ClassSums.of(scale * x, y, 4)
    assert whole.counts.tolist() == [*y.sum(0).tolist(), n]
    torch.testing.assert_close(whole.sums, torch.cat([y.T, torch.ones(1, n)]) @ (scale * x))
    assert (whole.examples, whole.of_classes()[0].shape) == (n, (4,))
    back = ClassSums.from_tensors(whole.to_tensors(), 5, 6, several=True)
    back.check()
    torch.testing.assert_close(back.gram, whole.gram, rtol=1e-5, atol=1e-5 * scale**2)
    split = ClassSums.of(scale * x[:1], y[:1], 4) + ClassSums.of(scale * x[1:], y[1:], 4)
    vector = ClassSums.from_vector(split.to_vector(), 5, 6, several=True)
    torch.testing.assert_close(vector.gram, whole.gram)
    torch.testing.assert_close(vector.total, whole.total)
    vector.times(2.0).check()


SEVERAL_LIES = LIES | {
    "class without examples": lambda s: {"counts": s.counts * torch.tensor([0.0, 1, 1, 1, 1])},
    "negative count": lambda s: {"counts": s.counts - torch.tensor([1e6, 0, 0, 0, 0])},
    "more than all": lambda s: {"counts": s.counts + torch.tensor([400.0, 0, 0, 0, 0])},
    "fewer examples": lambda s: {"counts": s.counts * torch.tensor([1, 1, 1, 1, 0.5])},
    "the sum of another class": lambda s: {"sums": s.sums + torch.outer(torch.tensor([1.0, 0, 0, 0, 0]), 9 * s.total)},
}


@pytest.mark.parametrize("lie", SEVERAL_LIES)
def test_sums_of_several_classes_of_no_examples_are_rejected(lie: str):
    x, y = several()
    honest = ClassSums.of(x, y, 4)
    with pytest.raises(ValueError, match="the head's"):
        dataclasses.replace(honest, **SEVERAL_LIES[lie](honest)).check()
