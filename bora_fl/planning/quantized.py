"""A linear layer that takes the memory of bitsandbytes' quantized ones, for steps on tensors without data."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class QuantizedLinear(nn.Linear):
    """Makes a dense weight for each product and drops it, where autocast would keep a copy of a plain weight.

    Attributes:
        bits: 8, where on a CPU the backward pass holds the input and autocast sees the product; or 4, where the product
            is of the weights' dtype.
    """

    bits = 8

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`."""
        if self.bits == 8:
            return _product(x, self.weight, self.bias, keeps_input=True)
        with torch.autocast(x.device.type, enabled=False):
            return _product(x.to(self.weight.dtype), self.weight, self.bias, keeps_input=False).to(x.dtype)


def stand_in(model: nn.Module, quantization: str, head: nn.Module | None) -> None:
    """Let a model's linear layers take the memory of quantized ones, in place.

    Args:
        model: Without data.
        quantization: ``8bit`` or ``4bit``.
        head: Stays as it is.
    """
    for module in model.modules():
        if type(module) is nn.Linear and module is not head:
            module.__class__ = QuantizedLinear
            module.bits = int(quantization[0])  # type: ignore[assignment]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, *, keeps_input: bool) -> Tensor:
    out: Tensor = _Product.apply(x, weight, bias, keeps_input)  # type: ignore[no-untyped-call]
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, keeps_input: bool) -> Tensor:
        ctx.shape, ctx.kept = weight.shape, x if keeps_input else None
        return F.linear(x, torch.empty(weight.shape, dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grads[0]
        return grad @ torch.empty(ctx.shape, dtype=grad.dtype), None, None, None
