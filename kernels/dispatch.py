"""The one entry to the fused layer: `bora_linear` picks a path by device, dtype and shape, `explain` says why.

Paths, first usable one wins; `BORA_KERNEL` asks for one by name, `auto` (or unset) for the first:

    expanded    CUDA and ROCm tensors of one dtype, without dropout, while b·r is small enough for dense products
    triton      CUDA and ROCm tensors, when Triton is installed, and a C compiler, which it starts with
    cpu         CPU tensors
    reference   anything: plain torch, slow, the definition
"""

import importlib.util
import logging
import os
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bora_fl.kernels.dropout import draw_seed
from bora_fl.kernels.layer_op import Layer, fused_layer
from bora_fl.kernels.reference import bora_branch_reference, in_functorch

logger = logging.getLogger(__name__)

PATHS = ("expanded", "triton", "cpu", "reference")
NUM_BLOCKS_FUSED = (1, 2, 4, 8, 16, 32)
RANKS_FUSED = range(1, 129)
# b·r up to which dense products cost a GPU less than Triton's kernels do (measured, docs/kernels.md): matrix units make
# their flops, b times as many, nearly free in half precision alone.
WIDTH_EXPANDED, WIDTH_EXPANDED_HALF = 256, 2048
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_HAS_COMPILER = bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))  # where Triton looks
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Explanation:
    """Which path a call takes, and why the others do not run."""

    path: str
    refused: dict[str, str]

    def __str__(self) -> str:
        reasons = "; ".join(f"not {path}: {reason}" for path, reason in self.refused.items())
        return f"{self.path} ({reasons})" if reasons else self.path


class _Call(NamedTuple):
    """What of a call decides its path."""

    device: str
    x: torch.dtype
    A: torch.dtype
    B: torch.dtype
    weight: torch.dtype | None
    trained_weight: bool
    num_blocks: int
    rank: int
    dropout: bool
    traced: bool  # by a torch.func transform
    interpreted: bool  # by Triton's interpreter
    wanted: str


def _why_not_expanded(call: _Call) -> str | None:
    if call.device != "cuda" and call.wanted != "expanded":
        return f"x is on {call.device}, where the path cpu takes dense products for small layers"
    if call.dropout:
        return "x goes through dropout, whose mask Triton's kernels draw on the way"
    if not call.x == call.A == call.B:
        return f"x is {call.x}, A {call.A} and B {call.B}"
    limit = WIDTH_EXPANDED_HALF if call.x in _HALF else WIDTH_EXPANDED
    if (width := call.num_blocks * call.rank) > limit:
        return f"b·r = {width} is above {limit}"
    return None


def _why_not_triton(call: _Call) -> str | None:
    if not _HAS_TRITON:
        return 'triton is not installed (pip install "bora-fl[triton]")'
    if call.device != "cuda" and not call.interpreted:
        return f"x is on {call.device}, and Triton's kernels run on cuda"
    if not _HAS_COMPILER and not call.interpreted:
        return "there is no C compiler, with which Triton builds what starts a kernel; install gcc, or name one in CC"
    if call.num_blocks not in NUM_BLOCKS_FUSED:
        return f"num_blocks {call.num_blocks} is not one of {NUM_BLOCKS_FUSED}"
    if call.rank not in RANKS_FUSED:
        return f"rank {call.rank} is above {RANKS_FUSED[-1]}"
    if call.A != call.B:
        return f"A is {call.A} and B is {call.B}"
    wider = call.x in _HALF and call.A is torch.float32
    if call.x != call.A and not wider:
        return f"x is {call.x} over {call.A} factors"
    if call.x not in (*_HALF, torch.float32):
        return f"x is {call.x}, and the kernels take float32, float16 and bfloat16"
    return None


def _why_not_cpu(call: _Call) -> str | None:
    if call.device != "cpu":
        return f"x is on {call.device}"
    if call.A != call.B:
        return f"A is {call.A} and B is {call.B}"
    return None


def _choose(call: _Call) -> Explanation:
    if call.wanted not in ("auto", *PATHS):
        raise ValueError(f"BORA_KERNEL={call.wanted!r} names no path: use auto, {', '.join(PATHS)}")
    refused: dict[str, str] = {}
    for path, why_not in (("expanded", _why_not_expanded), ("triton", _why_not_triton), ("cpu", _why_not_cpu)):
        reason = why_not(call)
        if call.trained_weight:
            reason = "the base weight is trained, and the fused paths hold it frozen"
        elif call.traced:
            reason = "a torch.func transform is tracing, and only plain torch operations may run"
        elif call.weight is not None and call.weight != call.x:
            reason = f"x is {call.x} and the base weight {call.weight}"
        if reason is None and call.wanted in ("auto", path):
            return Explanation(path, refused)
        refused[path] = reason or f"BORA_KERNEL={call.wanted}"
    return Explanation("reference", refused)


_chosen = cache(_choose)


def explain(
    x: Tensor, A: Tensor, Sigma: Tensor, B: Tensor, *, base_weight: Tensor | None = None, dropout_p: float = 0.0
) -> Explanation:
    """Say which path `bora_linear` takes for these tensors under the environment as it is, and why not the others.

    Args:
        x: `[..., n]`; `A`: `[r, n]`; `Sigma`: `[b, b, r]`; `B`: `[m, r]`.
        base_weight: `[m, n]`, or None.
        dropout_p: probability of dropping an element of x.

    Raises:
        ValueError: if `BORA_KERNEL` names no path.
    """
    return _explain(x, A, Sigma, B, base_weight, dropout_p, None)


def _explain(
    x: Tensor, A: Tensor, Sigma: Tensor, B: Tensor, weight: Tensor | None, dropout_p: float, low: torch.dtype | None
) -> Explanation:
    """`explain`, where x, A, B and the weight are going to be cast to `low`, unless it is None."""
    call = _Call(
        x.device.type,
        low or x.dtype,
        low or A.dtype,
        low or B.dtype,
        None if weight is None else low or weight.dtype,
        weight is not None and weight.requires_grad,
        Sigma.shape[0],
        Sigma.shape[2],
        dropout_p > 0,
        in_functorch(),
        os.environ.get("TRITON_INTERPRET") == "1",
        os.environ.get("BORA_KERNEL", "auto"),
    )
    # the compiler traces through a cache, and warns that it does
    return _choose(call) if torch.compiler.is_compiling() else _chosen(call)


@cache
def _log_fallback(refused: str) -> None:
    logger.warning("BoRA layers run on the reference path: %s", refused)


def _check_shapes(x: Tensor, A: Tensor, Sigma: Tensor, B: Tensor) -> None:
    r, n = A.shape
    b, m = Sigma.shape[0], B.shape[0]
    if x.shape[-1] != n or B.shape[1] != r or Sigma.shape != (b, b, r):
        raise ValueError(
            f"x {tuple(x.shape)}, A {tuple(A.shape)}, Sigma {tuple(Sigma.shape)} and B {tuple(B.shape)} do not fit: "
            "they must be [..., n], [r, n], [b, b, r] and [m, r]"
        )
    if n % b or m % b:
        raise ValueError(f"num_blocks {b} must divide in_features {n} and out_features {m}")


def bora_linear(
    x: Tensor,
    A: Tensor,
    Sigma: Tensor,
    B: Tensor,
    scaling: float,
    *,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return a BoRA layer's output, or its branch alone.

    Row block i of y is `x W_iᵀ + bias_i + scaling · Σ_j B_i diag(Sigma[i,j]) A_j x_j` (BoRA's forward equation).
    Differentiable once in x, A, Sigma and B; only the gradients that autograd asks for are computed. Under autocast
    x, A, B and the base layer are cast as `F.linear` would cast them, Sigma is not.

    Args:
        x: `[..., n]`.
        A: `[r, n]`, in x's dtype or wider.
        Sigma: `[b, b, r]`, effective (after its transform); b divides n and m.
        B: `[m, r]`.
        scaling: factor of the whole update.
        base_weight: `[m, n]`, in x's dtype; with it the result is the base layer's output plus the branch.
        base_bias: `[m]`; used with a base weight only.
        dropout_p: probability of dropping an element of x before A, in [0, 1); the caller passes 0 outside training.
        seed: `[]`, int64, on x's device; drawn from torch's default generator when None.

    Returns:
        y `[..., m]`, in x's dtype (under autocast: in autocast's dtype).

    Raises:
        ValueError: if the shapes do not fit together, or `dropout_p` is outside [0, 1).
    """
    _check_shapes(x, A, Sigma, B)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p} must be in [0, 1)")
    device = x.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    explanation = _explain(x, A, Sigma, B, base_weight, dropout_p, low)
    with torch.autocast(device, enabled=False) if low is not None else nullcontext():
        if explanation.path != "reference":
            layer = Layer(x, A, Sigma, B, base_weight, base_bias, seed, scaling, dropout_p, explanation.path)
            return fused_layer(layer, low)
        if os.environ.get("BORA_KERNEL") != "reference":
            _log_fallback(str(explanation))
        if low is not None:
            x, A, B = x.to(low), A.to(low), B.to(low)
            base_weight, base_bias = (None if t is None else t.to(low) for t in (base_weight, base_bias))
        y = bora_branch_reference(x, A, Sigma, B, scaling, dropout_p=dropout_p, seed=seed)
        return y if base_weight is None else functional.linear(x, base_weight, base_bias) + y
