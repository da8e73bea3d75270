"""Wide features on fewer directions, against the dense matrix."""

import pytest
import torch

from bora_fl.heads import ClassSums, Head, lda, narrow, narrowed, widen


def dense(dim: int, width: int) -> torch.Tensor:
    """P ``[d, k]``: what becomes of each unit vector."""
    return narrow(torch.eye(dim, dtype=torch.float64), width)


@pytest.mark.parametrize(("dim", "width"), [(12, 4), (13, 4), (7, 6), (5, 1), (300, 128)])
def test_columns_are_orthonormal_and_groups_of_nearly_equal_size(dim: int, width: int):
    P = dense(dim, width)
    torch.testing.assert_close(P.T @ P, torch.eye(width, dtype=torch.float64))
    sizes = (P != 0).sum(0)
    assert int((P != 0).sum()) == dim
    assert int(sizes.max() - sizes.min()) <= 1


@pytest.mark.parametrize(("dim", "width"), [(12, 4), (13, 4), (5, 1)])
def test_a_head_on_narrowed_features_is_a_head_on_all(dim: int, width: int):
    torch.manual_seed(0)
    x, head = torch.randn(9, dim).double(), Head(torch.randn(3, width).double(), torch.randn(3).double())
    torch.testing.assert_close(narrow(x, width), x @ dense(dim, width))
    torch.testing.assert_close(widen(head, dim)(x), head(narrow(x, width)))
    assert widen(Head(head.weight, None), dim).bias is None


@pytest.mark.parametrize("width", [0, 6, 7])
def test_narrow_features_stay_as_they_are(width: int):
    x = torch.randn(4, 6)
    assert narrow(x, width) is x
    assert narrowed(6, width) == 6
    head = Head(torch.randn(2, 6), None)
    assert widen(head, 6) is head


def test_every_site_has_the_same_directions():
    """Written down, since sums of other directions would add up to nonsense in silence."""
    half = 0.5**0.5
    signs = (dense(6, 3) / half).round().long().tolist()
    assert signs == [[0, -1, 0], [-1, 0, 0], [0, 0, 1], [0, -1, 0], [1, 0, 0], [0, 0, 1]]


def test_classes_that_lie_in_few_directions_are_still_told_apart():
    torch.manual_seed(1)
    labels = torch.arange(3000) % 3
    x = torch.randn(3000, 64).double()
    x[:, :32] += 3 * torch.randn(3, 32).double()[labels]
    head = widen(lda(ClassSums.of(narrow(x, 32), labels, 3)), 64)
    assert (head(x).argmax(1) == labels).double().mean() > 0.95
