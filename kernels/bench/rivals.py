"""What the bench times: one frozen layer and one adapter, by every way of computing them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from bora_fl.kernels.dispatch import bora_linear
from bora_fl.kernels.layer_op import Layer, fused_layer
from bora_fl.kernels.reference import branch_forward

Timed = Callable[[Tensor], Tensor]
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16/fp32": (torch.bfloat16, torch.float32),
}


@dataclass
class Problem:
    """The tensors that all rivals share; scaling is 1 throughout."""

    BORA: ClassVar[tuple[str, ...]] = (
        *("BoRA, this package", "BoRA, dense products", "BoRA, Triton kernels"),
        *("BoRA, block loop", "BoRA, einsum", "BoRA, bmm"),
    )

    x: Tensor  # [T, n]
    dy: Tensor  # [T, m]
    W: Tensor  # [m, n]
    bias: Tensor  # [m]
    A: Tensor  # [r, n]
    Sigma: Tensor  # [b, b, r]
    B: Tensor  # [m, r]

    @classmethod
    def draw(cls, tokens: int, n: int, m: int, b: int, r: int, dtype: str, device: str) -> "Problem":
        """Draw a layer at the scales of a trained one."""
        x_dtype, factor_dtype = DTYPES[dtype]

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype) -> Tensor:
            return (torch.randn(*shape) * scale).to(device, dtype)

        problem = cls(
            x=normal(tokens, n, dtype=x_dtype),
            dy=normal(tokens, m, dtype=x_dtype),
            W=normal(m, n, scale=n**-0.5, dtype=x_dtype),
            bias=normal(m, dtype=x_dtype),
            A=normal(r, n, scale=n**-0.5, dtype=factor_dtype),
            Sigma=(0.5 + torch.rand(b, b, r)).to(device, factor_dtype),
            B=normal(m, r, scale=0.1, dtype=factor_dtype),
        )
        for tensor in (problem.x, problem.A, problem.Sigma, problem.B):
            tensor.requires_grad_()
        return problem

    def parameters(self) -> tuple[Tensor, ...]:
        """Return the layer's own tensors."""
        return self.W, self.bias, self.A, self.Sigma, self.B

    def expected_bora(self) -> Tensor:
        """Return BoRA's output in float64."""
        with torch.no_grad():
            x, W, bias, A, Sigma, B = (t.double() for t in (self.x, self.W, self.bias, self.A, self.Sigma, self.B))
            return x @ W.T + bias + branch_forward(x, A, Sigma, B, 1.0)[0]


def _base(problem: Problem, x: Tensor) -> Tensor:
    return functional.linear(x, problem.W, problem.bias)


def _bora(problem: Problem) -> Timed:
    factors = problem.A, problem.Sigma, problem.B
    return lambda x: bora_linear(x, *factors, 1.0, base_weight=problem.W, base_bias=problem.bias)


def _on_path(path: str) -> Callable[[Problem], Timed]:
    def build(problem: Problem) -> Timed:
        factors = problem.A, problem.Sigma, problem.B
        return lambda x: fused_layer(Layer(x, *factors, problem.W, problem.bias, None, 1.0, 0.0, path))

    return build


def _with_branch(branch: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[[Problem], Timed]:
    def build(problem: Problem) -> Timed:
        def layer(x: Tensor) -> Tensor:
            y = _base(problem, x)
            return (y + branch(x.to(problem.A.dtype), problem.A, problem.Sigma, problem.B)).to(y.dtype)

        return layer

    return build


def _loop(x: Tensor, A: Tensor, Sigma: Tensor, B: Tensor) -> Tensor:
    b = Sigma.shape[0]
    u = [x_j @ A_j.T for x_j, A_j in zip(x.chunk(b, -1), A.chunk(b, -1), strict=True)]
    rows = zip(B.chunk(b), Sigma, strict=True)
    return torch.cat([sum(u_j * s_j for u_j, s_j in zip(u, row, strict=True)) @ B_i.T for B_i, row in rows], -1)


def _einsum(x: Tensor, A: Tensor, Sigma: Tensor, B: Tensor) -> Tensor:
    b, r = Sigma.shape[0], A.shape[0]
    u = torch.einsum("tjp,rjp->tjr", x.view(len(x), b, -1), A.view(r, b, -1))
    return torch.einsum("tir,iqr->tiq", torch.einsum("ijr,tjr->tir", Sigma, u), B.view(b, -1, r)).flatten(1)


def _bmm(x: Tensor, A: Tensor, Sigma: Tensor, B: Tensor) -> Tensor:
    b, r = Sigma.shape[0], A.shape[0]
    u = torch.bmm(x.view(len(x), b, -1).transpose(0, 1), A.view(r, b, -1).permute(1, 2, 0))  # [b, T, r]
    z = torch.bmm(Sigma.permute(2, 0, 1), u.permute(2, 0, 1))  # [r, b, T]
    return torch.bmm(z.permute(1, 2, 0), B.view(b, -1, r).transpose(1, 2)).transpose(0, 1).flatten(1)


def _peft(expand: bool) -> Callable[[Problem], Timed]:
    def build(problem: Problem) -> Timed:
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear

        (m, n), r = problem.W.shape, problem.A.shape[0] * (problem.Sigma.shape[0] if expand else 1)
        base = nn.Linear(n, m, device=problem.x.device, dtype=problem.x.dtype).requires_grad_(False)
        base.weight.data, base.bias.data = problem.W, problem.bias
        layer = Linear(base, "default", config=LoraConfig(r=r, lora_alpha=r), r=r, lora_alpha=r)
        for factor in (layer.lora_A, layer.lora_B):
            factor.to(problem.x.device, problem.A.dtype).requires_grad_(True)
        nn.init.normal_(layer.lora_B["default"].weight)
        called: Timed = layer
        return called

    return build


class _LoraFunction(torch.autograd.Function):
    """LoRA with the savings a hand-written backward brings, so that BoRA's cost shows apart from them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        h = x @ A.t()
        ctx.save_for_backward(x, W, A, B, h)
        return torch.addmm(bias, h, B.t()).addmm_(x, W.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, h = ctx.saved_tensors
        dh = dy @ B
        return (dh @ A).addmm_(dy, W), None, None, dh.t() @ x, (h.t() @ dy).t()


def _lora_function(problem: Problem) -> Timed:
    def layer(x: Tensor) -> Tensor:
        # One dtype throughout: over mixed dtypes it has no in-place products to save with.
        A, B = problem.A.to(x.dtype), problem.B.to(x.dtype)
        y: Tensor = _LoraFunction.apply(x, problem.W, problem.bias, A, B)  # type: ignore[no-untyped-call]
        return y

    return layer


GPU_ALONE = frozenset({"BoRA, dense products", "BoRA, Triton kernels"})  # both ways that a GPU's dispatch picks from
RIVALS: dict[str, Callable[[Problem], Timed]] = {
    "frozen layer alone": lambda problem: lambda x: _base(problem, x),
    "BoRA, this package": _bora,
    "BoRA, dense products": _on_path("expanded"),
    "BoRA, Triton kernels": _on_path("triton"),
    "PEFT LoRA, rank r": _peft(expand=False),
    "PEFT LoRA, rank b·r": _peft(expand=True),
    "LoRA, custom Function": _lora_function,
    "BoRA, block loop": _with_branch(_loop),
    "BoRA, einsum": _with_branch(_einsum),
    "BoRA, bmm": _with_branch(_bmm),
}
