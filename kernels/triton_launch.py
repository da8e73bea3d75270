"""The GPU path: bind tensors to the launches of `launch_plan.py`, and leave the large products to the vendor's GEMM.

The branch is written into y (or dx) first and the base product is accumulated onto it with beta = 1, so the branch
costs one write of y; the GEMM's epilogue reads it back. Saved for the backward pass: x and u.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from bora_fl.kernels import triton_backward, triton_forward
from bora_fl.kernels.dropout import drop_threshold, keep_scale
from bora_fl.kernels.launch_plan import Launch, LayerShape, backward_plan, forward_plan
from bora_fl.kernels.reference import Gradients, Needs, unit_rows

KERNELS: dict[str, Any] = {
    kernel.fn.__name__: kernel
    for kernel in (
        triton_forward.down_kernel,
        triton_forward.mix_kernel,
        triton_forward.up_kernel,
        triton_backward.dy_kernel,
        triton_backward.mix_back_kernel,
        triton_backward.x_kernel,
        triton_backward.reduce_kernel,
    )
}


def shape_of(x: Tensor, A: Tensor, Sigma: Tensor, B: Tensor, bias: Tensor | None, seed: Tensor | None) -> LayerShape:
    """Read a call's shape off its tensors."""
    return LayerShape(
        tokens=x.shape[0],
        in_features=x.shape[1],
        out_features=B.shape[0],
        num_blocks=Sigma.shape[0],
        rank=A.shape[0],
        x_dtype=x.dtype,
        factor_dtype=A.dtype,
        row_stride=x.stride(0),
        bias=bias is not None,
        dropout=seed is not None,
        backend="hip" if torch.version.hip else "cuda",
        interpreted=bool(knobs.runtime.interpret),
    )


# Compiled kernels by what Triton compiles them for. Its own look-up takes longer than most of these kernels run.
_compiled: dict[tuple[Any, ...], Any] = {}


def _run(launches: Sequence[Launch], device: torch.device, arguments: dict[str, Any]) -> None:
    # Triton launches on the current device, which need not be the tensors'.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        for launch in launches:
            kernel = KERNELS[launch.kernel]
            named = {**arguments, **launch.integers, **launch.constants}
            given = [named[name] for name in kernel.arg_names]
            # Triton compiles for dtypes and for pointers that are multiples of 16 bytes or not; no integer and no float
            # that it would compile for is given at run time.
            kinds = ((value.dtype, value.data_ptr() % 16) for value in given if isinstance(value, Tensor))
            key = (launch.compiled_as, device, *kinds)
            if (compiled := _compiled.get(key)) is not None:
                compiled[launch.grid](*given)
                continue
            options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
            compiled = kernel[launch.grid](*given, **options)
            if compiled is not None and not knobs.runtime.interpret:
                _compiled[key] = compiled


def forward(
    x: Tensor,
    A: Tensor,
    Sigma: Tensor,
    B: Tensor,
    scaling: float,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return `y [T, m]` in x's dtype and `u [T, b, r]` in A's, which `backward` wants back.

    Args:
        x: `[T, n]`, unit stride along rows; float32, float16 or bfloat16.
        A: `[r, n]`; `Sigma`: `[b, b, r]`; `B`: `[m, r]`; in x's dtype or float32.
        scaling: factor of the whole update.
        weight: `[m, n]`, in x's dtype, or None for the branch alone.
        bias: `[m]`, or None.
        dropout_p: probability of dropping an element of x before A.
        seed: `[]`, int64; None without dropout.
    """
    x, A, Sigma, B = unit_rows(x), A.contiguous(), Sigma.contiguous(), B.contiguous()
    u = A.new_empty(x.shape[0], Sigma.shape[0], A.shape[0])
    y = x.new_empty(x.shape[0], B.shape[0])
    if x.shape[0] == 0:
        return y, u
    shape = shape_of(x, A, Sigma, B, bias, seed)
    arguments = {
        **_inputs(x, A, Sigma, B, scaling, dropout_p, seed),
        "u": u,
        "z": torch.empty_like(u),
        "y": y,
        "bias": y if bias is None else bias,
    }
    _run(forward_plan(shape), x.device, arguments)
    if weight is not None:
        y.addmm_(x, weight.t())
    return y, u


def backward(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    A: Tensor,
    Sigma: Tensor,
    B: Tensor,
    scaling: float,
    weight: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    needs: Needs,
) -> Gradients:
    """Return the gradients of `forward` in the dtypes of their tensors; None where `needs` is False."""
    x, A, Sigma, B, dy = unit_rows(x), A.contiguous(), Sigma.contiguous(), B.contiguous(), dy.contiguous()
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs.x else None
    dA, dSigma, dB = (torch.zeros_like(like) if x.shape[0] == 0 else torch.empty_like(like) for like in (A, Sigma, B))
    if x.shape[0] > 0:
        plan = backward_plan(shape_of(x, A, Sigma, B, None, seed), needs)
        slices = {name: count for launch in plan for name, count in launch.integers.items() if "slices" in name}

        def buffer(name: str, like: Tensor) -> Tensor:
            return torch.empty(slices.get(name, 0), like.numel(), dtype=torch.float32, device=x.device)

        dA_slices, dB_slices = buffer("slices_A", A), buffer("slices_B", B)
        dSigma_slices = buffer("slices_Sigma", Sigma)
        arguments = {
            **_inputs(x, A, Sigma, B, scaling, dropout_p, seed),
            "dy": dy,
            "u": u,
            "z": torch.empty_like(u),
            "dz": torch.empty_like(u),
            "du": torch.empty_like(u),
            "dx": x if dx is None else dx,
            "dA_slices": dA_slices,
            "dB_slices": dB_slices,
            "dSigma_slices": dSigma_slices,
        }
        passes = [launch for launch in plan if launch.kernel != "reduce_kernel"]
        _run(passes, x.device, {**arguments, "dA": dA_slices, "dB": dB_slices, "dSigma": dSigma_slices})
        _run(plan[len(passes) :], x.device, {**arguments, "dA": dA, "dB": dB, "dSigma": dSigma})
        if dx is not None and weight is not None:
            dx.addmm_(dy, weight)
    return Gradients(dx, dA if needs.A else None, dSigma if needs.Sigma else None, dB if needs.B else None)


def _inputs(
    x: Tensor, A: Tensor, Sigma: Tensor, B: Tensor, scaling: float, dropout_p: float, seed: Tensor | None
) -> dict[str, Any]:
    """Name the arguments that both passes read."""
    return {
        "x": x,
        "A": A,
        "Sigma": Sigma,
        "B": B,
        "scaling": float(scaling),
        "seed": x if seed is None else seed,
        "threshold": drop_threshold(dropout_p),
        "keep_scale": keep_scale(dropout_p),
    }
