"""The one entry to the fused layer: `bora_linear` picks a path by device, dtype and shape, `explain` says why.

Paths, first usable one wins; `BORA_KERNEL=reference|cpu|triton` asks for one by name, `auto` (or unset) for the first:

    triton      CUDA and ROCm tensors, when Triton is installed
    cpu         CPU tensors
    reference   anything: plain torch, slow, the definition
"""

import importlib.util
import logging
import os
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from bora_fl.kernels.dropout import draw_seed
from bora_fl.kernels.layer_op import Layer, fused_layer
from bora_fl.kernels.reference import bora_branch_reference, in_functorch

logger = logging.getLogger(__name__)

PATHS = ("triton", "cpu", "reference")
NUM_BLOCKS_FUSED = (1, 2, 4, 8, 16, 32)
RANKS_FUSED = range(1, 129)
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Explanation:
    """Which path a call takes, and why the others do not run."""

    path: str
    refused: dict[str, str]

    def __str__(self) -> str:
        reasons = "; ".join(f"not {path}: {reason}" for path, reason in self.refused.items())
        return f"{self.path} ({reasons})" if reasons else self.path


def _why_not_triton(x: Tensor, A: Tensor, Sigma: Tensor, B: Tensor) -> str | None:
    if not _HAS_TRITON:
        return 'triton is not installed (pip install "bora-fl[triton]")'
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"x is on {x.device.type}, and Triton's kernels run on cuda"
    if Sigma.shape[0] not in NUM_BLOCKS_FUSED:
        return f"num_blocks {Sigma.shape[0]} is not one of {NUM_BLOCKS_FUSED}"
    if A.shape[0] not in RANKS_FUSED:
        return f"rank {A.shape[0]} is above {RANKS_FUSED[-1]}"
    if A.dtype != B.dtype:
        return f"A is {A.dtype} and B is {B.dtype}"
    if x.dtype != A.dtype and not (x.dtype in _HALF and A.dtype == torch.float32):
        return f"x is {x.dtype} over {A.dtype} factors"
    if x.dtype not in (*_HALF, torch.float32):
        return f"x is {x.dtype}, and the kernels take float32, float16 and bfloat16"
    return None


def _why_not_cpu(x: Tensor, A: Tensor, B: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device.type}"
    if A.dtype != B.dtype:
        return f"A is {A.dtype} and B is {B.dtype}"
    return None


def explain(x: Tensor, A: Tensor, Sigma: Tensor, B: Tensor, *, base_weight: Tensor | None = None) -> Explanation:
    """Say which path `bora_linear` takes for these tensors under the environment as it is, and why not the others.

    Args:
        x: `[..., n]`; `A`: `[r, n]`; `Sigma`: `[b, b, r]`; `B`: `[m, r]`.
        base_weight: `[m, n]`, or None.

    Raises:
        ValueError: if `BORA_KERNEL` names no path.
    """
    wanted = os.environ.get("BORA_KERNEL", "auto")
    if wanted not in ("auto", *PATHS):
        raise ValueError(f"BORA_KERNEL={wanted!r} names no path: use auto, {', '.join(PATHS)}")
    refused: dict[str, str] = {}
    for path, reason in (("triton", _why_not_triton(x, A, Sigma, B)), ("cpu", _why_not_cpu(x, A, B))):
        if base_weight is not None and base_weight.requires_grad:
            reason = "the base weight is trained, and the fused paths hold it frozen"
        elif in_functorch():
            reason = "a torch.func transform is tracing, and only plain torch operations may run"
        elif base_weight is not None and base_weight.dtype != x.dtype:
            reason = f"x is {x.dtype} and the base weight {base_weight.dtype}"
        if reason is None and wanted in ("auto", path):
            return Explanation(path, refused)
        refused[path] = reason or f"BORA_KERNEL={wanted}"
    return Explanation("reference", refused)


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
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        x, A, B = x.to(low), A.to(low), B.to(low)
        base_weight, base_bias = (None if t is None else t.to(low) for t in (base_weight, base_bias))
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    explanation = explain(x, A, Sigma, B, base_weight=base_weight)
    with torch.autocast(device, enabled=False):
        if explanation.path == "reference":
            if os.environ.get("BORA_KERNEL") != "reference":
                _log_fallback(str(explanation))
            y = bora_branch_reference(x, A, Sigma, B, scaling, dropout_p=dropout_p, seed=seed)
            return y if base_weight is None else functional.linear(x, base_weight, base_bias) + y
        rows = x.reshape(-1, x.shape[-1])
        layer = Layer(rows, A, Sigma, B, base_weight, base_bias, seed, scaling, dropout_p, explanation.path)
        return fused_layer(layer).view(*x.shape[:-1], B.shape[0])
