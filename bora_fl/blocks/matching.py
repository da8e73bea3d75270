"""Which component of a layer's factors is which of those before a merge."""

import torch
from torch import Tensor

ALIGNED = 0.9
"""The least cosine of two rows of A that are the same component."""


def matches(rows: Tensor, before: Tensor) -> Tensor | None:
    """For each row the row before that points the same way, each of them once.

    Args:
        rows: A now, ``[r, n]``.
        before: A before, ``[r', n]``.

    Returns:
        ``[r]``, a row of `before` or -1; None if A is of another width.
    """
    if rows.dim() != 2 or before.dim() != 2 or rows.shape[1] != before.shape[1]:
        return None
    unit, known = (torch.nn.functional.normalize(a.double(), dim=1) for a in (rows, before))
    cosines = unit @ known.T
    best, source = cosines.max(1)
    mutual = cosines.argmax(0)[source] == torch.arange(len(rows))
    return torch.where((best >= ALIGNED) & mutual, source, -1)
