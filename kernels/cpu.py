"""The CPU path: what is cheapest for the size and dtype at hand, with the same numbers, saving nothing but x.

Memory passes and calls, not arithmetic, are what a low-rank branch costs on a CPU. Two choices follow, each its own:

- **merged weight**: with many tokens, `W + delta_W` is formed once per call (`2·m·n·r` flops, whatever T is) and takes
  the place of W in the large products, `y = x (W + delta_W)ᵀ` and `dx = dY (W + delta_W)`; the branch then costs no
  pass over y or dx. Only in float32 and float64: in a half-precision weight small updates would be rounded away;
- **small products**: as one LoRA of rank b·r (`expanded.py`) or block by block in cache-sized chunks
  (`cpu_chunked.py`).
"""

import torch
from torch import Tensor
from torch.nn import functional

from bora_fl.kernels import cpu_chunked, expanded
from bora_fl.kernels.reference import Gradients, Needs, apply_dropout, unit_rows

_HALF = (torch.float16, torch.bfloat16)
_SMALL = 2**25  # multiply-adds of an expanded branch that take about as long as the calls they save


def prefers_merged(x: Tensor, A: Tensor, B: Tensor, weight: Tensor | None, keep: Tensor | None) -> bool:
    """Say whether forming `W + delta_W` is exact enough and cheaper than a separate branch.

    The branch costs in proportion to `T·(m + n)`, the merged weight to `m·n`; they meet near `T·(m + n) = 2·m·n`.
    """
    m, n, tokens = B.shape[0], A.shape[1], x.shape[0]
    full = x.dtype == A.dtype and x.dtype in (torch.float32, torch.float64)
    return weight is not None and keep is None and full and tokens * (m + n) >= 2 * m * n


def prefers_expanded(x: Tensor, A: Tensor, Sigma: Tensor, B: Tensor) -> bool:
    """Say whether one LoRA of rank b·r is quicker than the blocks: with matrix units, or for a small layer."""
    rank = Sigma.shape[0] * A.shape[0]
    if x.dtype != A.dtype:
        return False
    return (x.dtype in _HALF and rank <= 256) or x.shape[0] * rank * (A.shape[1] + B.shape[0]) <= _SMALL


def forward(
    x: Tensor,
    A: Tensor,
    Sigma: Tensor,
    B: Tensor,
    scaling: float,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    keep: Tensor | None,
) -> Tensor:
    """Return `y [T, m]` in x's dtype: branch, plus `x Wᵀ + bias` where a weight is given.

    Args:
        x: `[T, n]`; `A`, `Sigma`, `B`, `scaling`: as in `reference.branch_forward`, of any float dtype.
        weight: `[m, n]`, in x's dtype, or None.
        bias: `[m]`, or None.
        dropout_p: probability of dropping an element of x before A.
        keep: `[T, n]`, bool, the dropout mask; None without dropout.
    """
    if weight is not None and prefers_merged(x, A, B, weight, keep):
        return functional.linear(x, _merge(weight, A, Sigma, B, scaling), bias)
    y = functional.linear(x, weight, bias) if weight is not None else x.new_zeros(x.shape[0], B.shape[0])
    if prefers_expanded(x, A, Sigma, B):
        u = expanded.project(unit_rows(apply_dropout(x, keep, dropout_p)), A, Sigma.shape[0])
        expanded.add_branch(y, u, Sigma, B, scaling)
    else:
        cpu_chunked.add_branch(y, x, A, Sigma, B, scaling, keep, dropout_p)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    A: Tensor,
    Sigma: Tensor,
    B: Tensor,
    scaling: float,
    weight: Tensor | None,
    dropout_p: float,
    keep: Tensor | None,
    needs: Needs,
) -> Gradients:
    """Return the gradients of `forward` in the dtypes of their tensors; None where `needs` is False."""
    merged = prefers_merged(x, A, B, weight, keep)
    dx = None
    if needs.x and weight is None:
        dx = torch.zeros_like(x)
    elif needs.x and weight is not None:
        dx = torch.mm(dy, _merge(weight, A, Sigma, B, scaling) if merged else weight)
    into_dx = None if merged else dx
    if into_dx is None and not any(needs[1:]):
        return Gradients(dx, None, None, None)
    if prefers_expanded(x, A, Sigma, B):
        dropped = unit_rows(apply_dropout(x, keep, dropout_p))
        u = expanded.project(dropped, A, Sigma.shape[0]) if needs.Sigma or needs.B else None
        grads = expanded.add_gradients(into_dx, dy, dropped, u, A, Sigma, B, scaling, keep, dropout_p, needs)
    else:
        grads = cpu_chunked.add_gradients(into_dx, dy, x, A, Sigma, B, scaling, keep, dropout_p, needs)
    return Gradients(dx, *grads)


def _merge(weight: Tensor, A: Tensor, Sigma: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return `W + delta_W`, `[m, n]`, so many row blocks at a time as a cache's worth of delta_W holds."""
    (m, n), b, r = weight.shape, Sigma.shape[0], A.shape[0]
    q, p = m // b, n // b
    A_blocks = A.view(r, b, p).transpose(0, 1)  # [b, r, p]
    W_blocks, merged = weight.reshape(b, q, b, p), torch.empty(b, q, b, p, dtype=weight.dtype)
    B_blocks = B.reshape(b, 1, q, r) * (Sigma * scaling).to(weight.dtype).unsqueeze(2)  # [i, j, q, r]
    step = max(1, cpu_chunked.CHUNK_BYTES // (q * n * weight.element_size()))
    for start in range(0, b, step):
        rows = slice(start, start + step)
        delta = torch.matmul(B_blocks[rows], A_blocks)  # [i, j, q, p]
        torch.add(W_blocks[rows], delta.transpose(1, 2), out=merged[rows])
    return merged.view(m, n)
