"""One differentiable operator for the fused layer, eager and compiled.

A path is a pair of functions on matrices, forward and backward; this module gives them autograd. Eager code runs an
autograd Function; under `torch.compile` the same pair runs as the custom operators `bora_fl::layer` and
`bora_fl::layer_backward`, whose fake implementations tell the compiler every shape. Dense products (`expanded`) need no
operator of their own there: the compiler sees into them. Saved for backward: x, and what the path returns beside y (u
on the GPU, the dropout mask on the CPU, nothing on the CPU without dropout).
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bora_fl.kernels import cpu, expanded
from bora_fl.kernels.dropout import keep_mask
from bora_fl.kernels.reference import Gradients, Needs


class Layer(NamedTuple):
    """The arguments of one call: x, of which a path takes the rows `[T, n]`, the layer's tensors and its numbers.

    They are those of `dispatch.bora_linear`.
    """

    x: Tensor
    A: Tensor
    Sigma: Tensor
    B: Tensor
    weight: Tensor | None
    bias: Tensor | None
    seed: Tensor | None
    scaling: float
    dropout_p: float
    path: str

    def on_rows(self, low: torch.dtype | None) -> "Layer":
        """The call on `x [T, n]`, with what `F.linear` would cast under autocast in dtype `low`."""
        x, A, Sigma, B, weight, bias = self[:6]
        if low is not None:
            x, A, B = x.to(low), A.to(low), B.to(low)
            weight, bias = None if weight is None else weight.to(low), None if bias is None else bias.to(low)
        return Layer(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), A, Sigma, B, weight, bias, *self[6:])


def _forward(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return y and the path's own saved tensor, which may be empty."""
    x, A, Sigma, B, weight, bias, seed, scaling, dropout_p, path = layer
    if path == "triton":
        from bora_fl.kernels import triton_launch  # imported on use: Triton is an optional dependency

        return triton_launch.forward(x, A, Sigma, B, scaling, weight, bias, dropout_p, seed)
    if path == "expanded":
        return expanded.forward(x, A, Sigma, B, scaling, weight, bias)
    keep = None if seed is None else keep_mask(x.shape[0], x.shape[1], dropout_p, seed)
    y = cpu.forward(x, A, Sigma, B, scaling, weight, bias, dropout_p, keep)
    return y, x.new_empty(0, dtype=torch.bool) if keep is None else keep


def _backward(dy: Tensor, saved: Tensor, layer: Layer, needs: Needs) -> Gradients:
    x, A, Sigma, B, weight, _, seed, scaling, dropout_p, path = layer
    if path == "triton":
        from bora_fl.kernels import triton_launch

        return triton_launch.backward(dy, x, saved, A, Sigma, B, scaling, weight, dropout_p, seed, needs)
    if path == "expanded":
        return expanded.backward(dy, x, saved, A, Sigma, B, scaling, weight, needs)
    keep = None if seed is None else saved
    return cpu.backward(dy, x, A, Sigma, B, scaling, weight, dropout_p, keep, needs)


class _EagerLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, low: torch.dtype | None, *arguments: Any) -> Tensor:
        # Casts and changes of shape are in here, for autograd to keep one node a layer and not seven.
        layer = Layer(*arguments)
        ctx.shape = shape = layer.x.shape
        layer = layer.on_rows(low)
        y, saved = _forward(layer)
        ctx.save_for_backward(*layer[:7], saved)
        ctx.numbers = layer[7:]
        # no view for autograd: the caller may change the output in place
        return y if len(shape) == 2 else torch.ops.aten._unsafe_view(y, (*shape[:-1], y.shape[1]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        *tensors, saved = ctx.saved_tensors
        autocast = torch.is_autocast_enabled(dy.device.type)
        with torch.autocast(dy.device.type, enabled=False) if autocast else nullcontext():
            rows = dy.reshape(-1, dy.shape[-1])
            dx, *rest = _backward(rows, saved, Layer(*tensors, *ctx.numbers), Needs(*ctx.needs_input_grad[1:5]))
        # autograd casts gradients to the dtypes of what was cast
        return None, None if dx is None else dx.view(ctx.shape), *rest, None, None, None, None, None, None


@torch.library.custom_op("bora_fl::layer", mutates_args=())
def _layer_op(
    x: Tensor,
    A: Tensor,
    Sigma: Tensor,
    B: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    path: str,
) -> tuple[Tensor, Tensor]:
    return _forward(Layer(x, A, Sigma, B, weight, bias, seed, scaling, dropout_p, path))


@_layer_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    layer = Layer(*arguments)
    y = layer.x.new_empty(layer.x.shape[0], layer.B.shape[0])
    if layer.path != "cpu":
        saved = layer.A.new_empty(layer.x.shape[0], layer.Sigma.shape[0], layer.A.shape[0])
    else:
        saved = layer.x.new_empty(0 if layer.seed is None else layer.x.shape, dtype=torch.bool)
    return y, saved


@torch.library.custom_op("bora_fl::layer_backward", mutates_args=())
def _layer_backward_op(
    dy: Tensor,
    saved: Tensor,
    x: Tensor,
    A: Tensor,
    Sigma: Tensor,
    B: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    path: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layer = Layer(x, A, Sigma, B, weight, bias, seed, scaling, dropout_p, path)
    grads = _backward(dy, saved, layer, Needs(*needs))
    # contiguous, as the fake implementation below tells the compiler
    dx, dA, dSigma, dB = (x.new_empty(0) if grad is None else grad.contiguous() for grad in grads)
    return dx, dA, dSigma, dB


@_layer_backward_op.register_fake
def _(
    dy: Tensor, saved: Tensor, x: Tensor, A: Tensor, Sigma: Tensor, B: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs: list[bool] = arguments[-1]
    dx, dA, dSigma, dB = (
        x.new_empty(0) if not needed else torch.empty_like(like, memory_format=torch.contiguous_format)
        for like, needed in zip((x, A, Sigma, B), needs, strict=True)
    )
    return dx, dA, dSigma, dB


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    layer = Layer(*inputs)
    ctx.save_for_backward(*layer[:7], output[1])
    ctx.numbers = layer[7:]


def _compiled_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    *tensors, saved = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    grads = _layer_backward_op(dy, saved, *tensors, *ctx.numbers, needs)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *(None,) * 6


_layer_op.register_autograd(_compiled_backward, setup_context=_setup)


def fused_layer(layer: Layer, low: torch.dtype | None = None) -> Tensor:
    """Return `y [..., m]`, differentiable once in x, A, Sigma and B (weight and bias are frozen).

    Args:
        layer: The call.
        low: What x, A, B, the weight and the bias are cast to, as under autocast; None leaves them as they are.
    """
    y: Tensor
    if not torch.compiler.is_compiling():
        y = _EagerLayer.apply(low, *layer)  # type: ignore[no-untyped-call]
        return y
    shape, layer = layer.x.shape, layer.on_rows(low)
    if layer.path == "expanded":
        y = expanded.traceable(layer.x, layer.A, layer.Sigma, layer.B, layer.scaling, layer.weight, layer.bias)
    else:
        y = _layer_op(*layer)[0]
    return y.view(*shape[:-1], layer.B.shape[0])
