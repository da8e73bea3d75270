"""The adapter module, and the PEFT layer that holds a base layer and its adapters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bora_fl.blocks import BlockFactors
from bora_fl.kernels.dispatch import bora_linear

from .base_weight import add_to_base, as_stored, is_transposed
from .config import BoraConfig
from .mixed_batch import add_branches
from .sigma import init_sigma_, to_effective


class BoraAdapter(nn.Module):
    """The trained factors of one layer: `y = scaling · Σ_j B_i diag(Sigma[i, j]) A_j x_j` for each row block i.

    The weights are direct parameters and every use goes through `__call__`, with tensors alone as positional inputs and
    no buffers, so that per-sample gradient hooks see all there is.

    Args:
        in_features: n, divisible by `num_blocks`.
        out_features: m, divisible by `num_blocks`.
        rank: r.
        num_blocks: b.
        scaling: Factor of the update.
        sigma_transform: `"exp_norm"` or `"identity"`.
        dropout_p: Probability of dropping an input of the branch while training.

    Attributes:
        A: `[r, n]`.
        sigma: `[b, b, r]`, before its transform.
        B: `[m, r]`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        num_blocks: int,
        scaling: float,
        sigma_transform: str = "exp_norm",
        dropout_p: float = 0.0,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.num_blocks = num_blocks
        self.scaling = scaling
        self.sigma_transform = sigma_transform
        self.dropout_p = dropout_p
        self.given_sigma: Tensor | None = None  # the effective Sigma, within `sigma_batch.sigmas_at_once`
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.sigma = nn.Parameter(torch.empty(num_blocks, num_blocks, rank))
        self.B = nn.Parameter(torch.empty(out_features, rank))
        self.reset_parameters()

    def reset_parameters(self, init_weights: bool = True, sigma_init: str = "auto") -> None:
        """Draw A and sigma anew; B is zero, or random if `init_weights` is False."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        init_sigma_(self.sigma, self.sigma_transform, sigma_init)
        if init_weights:
            nn.init.zeros_(self.B)
        else:
            nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))

    def effective_sigma(self) -> Tensor:
        """Return Sigma `[b, b, r]`, differentiable in sigma."""
        if self.given_sigma is not None:
            return self.given_sigma
        return to_effective(self.sigma, self.sigma_transform)

    def factors(self) -> BlockFactors:
        """Return the factors with the effective Sigma; A and B share memory with the parameters."""
        return BlockFactors(
            B=self.B.detach(), sigma=self.effective_sigma().detach(), A=self.A.detach(), scaling=self.scaling
        )

    def forward(self, x: Tensor, *base: Tensor) -> Tensor:
        """Return the branch's output, plus the base layer's when its weights are given.

        Args:
            x: `[..., n]`.
            base: Nothing, `(weight [m, n],)` or `(weight [m, n], bias [m])`.

        Returns:
            `[..., m]`, in x's dtype.
        """
        weight, bias = (*base, None, None)[:2]
        y: Tensor = bora_linear(
            x,
            self.A,
            self.effective_sigma(),
            self.B,
            self.scaling,
            base_weight=weight,
            base_bias=bias,
            dropout_p=self.dropout_p if self.training else 0.0,
        )
        return y

    def extra_repr(self) -> str:
        """Return the settings, for `print(model)`."""
        m, n = self.B.shape[0], self.A.shape[1]
        return (
            f"in_features={n}, out_features={m}, rank={self.rank}, num_blocks={self.num_blocks}, "
            f"scaling={self.scaling:g}, sigma_transform={self.sigma_transform!r}, dropout_p={self.dropout_p:g}"
        )


class BoraLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer with BoRA adapters, one `BoraAdapter` per adapter name in `bora_adapter`.

    Args:
        base_layer: An `nn.Linear`, a `Conv1D`, or a quantized linear layer that PEFT knows.
        quantization_kwargs: What PEFT needs to quantize a merged weight again.
    """

    adapter_layer_names = ("bora_adapter",)
    other_param_names = ()

    # What BaseTunerLayer provides, declared for the type checker.
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bora_adapter = nn.ModuleDict()
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization_kwargs)
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    def adapter(self, adapter_name: str) -> BoraAdapter:
        """Return the named adapter."""
        return cast(BoraAdapter, self.bora_adapter[adapter_name])

    def update_layer(self, adapter_name: str, config: BoraConfig, rank: int, alpha: float) -> None:
        """Add an adapter.

        Args:
            adapter_name: Its name.
            config: Its settings.
            rank: r of this layer.
            alpha: alpha of this layer.
        """
        adapter = BoraAdapter(
            self.in_features,
            self.out_features,
            rank,
            config.num_blocks,
            config.scaling(rank, alpha),
            config.sigma_transform,
            config.bora_dropout,
        )
        adapter.reset_parameters(config.init_weights, config.sigma_init)
        adapter.train(self.training)
        self.bora_adapter[adapter_name] = adapter
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return the adapter's update in the layout of the base weight, `[m, n]` or, for Conv1D, `[n, m]`.

        It has the adapter's dtype and is computed in float32 at least.
        """
        return as_stored(self, self._delta(adapter_name)).to(self.adapter(adapter_name).A.dtype)

    def _delta(self, adapter_name: str) -> Tensor:
        """Return the adapter's update `[m, n]` in float32 at least."""
        factors = self.adapter(adapter_name).factors()
        return factors.to(torch.promote_types(factors.A.dtype, torch.float32)).dense()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of the named (by default: the active) adapters to the base weight.

        Args:
            safe_merge: Check the sum for NaN and infinity before it replaces the weight.
            adapter_names: Adapters to merge.

        Raises:
            ValueError: With `safe_merge`, if the sum is not finite; the weight is then as it was.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.bora_adapter:
                continue
            try:
                add_to_base(self, self._delta(name), finite=safe_merge)
            except ValueError as error:
                raise ValueError(f"{error}. The adapter {name} seems to be broken") from error
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract the merged updates from the base weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            add_to_base(self, -self._delta(self.merged_adapters[-1]))
            self.merged_adapters.pop()

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus the active adapters' branches.

        Args:
            x: `[..., n]`.
            args: For the base layer, as are all other keywords.
            adapter_names: Instead of the active adapters, one name for each row of x; see `mixed_batch`.

        Raises:
            ValueError: There are other than one adapter name a row, or adapters are merged while there are names.
        """
        if adapter_names is not None:
            self._check_names(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            base = self._call_base(x, *args, **kwargs)
            return add_branches(base, x, cast("dict[str, BoraAdapter]", self.bora_adapter), adapter_names)
        adapters: list[BoraAdapter] = []
        if not (self.disable_adapters or self.merged):
            adapters = [self.adapter(name) for name in self.active_adapters if name in self.bora_adapter]
        result: Tensor
        fused = len(adapters) == 1 and not args and not kwargs and self._base_can_be_fused(x)
        if fused and not _in_opacus(adapters[0]):
            result = adapters[0](x, *self._base_tensors())
            return result
        result = self._call_base(x, *args, **kwargs)
        for adapter in adapters:
            result = result + adapter(x).to(result.dtype)
        return result

    def _call_base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        backend = self.quantization_backend
        return result if backend is None else cast(Tensor, backend.maybe_clone_base_result(result))

    def _check_names(self, x: Tensor, names: Sequence[str]) -> None:
        """Refuse what PEFT's LoRA refuses, in its words."""
        if len(x) != len(names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell PEFT's `convert_to_lora` that the update is a weight difference."""
        return True

    def extra_repr(self) -> str:
        """Return the quantization backend, for `print(model)`."""
        return str(quantization_extra_repr(self))

    def __repr__(self) -> str:
        return "bora." + super().__repr__()

    def _base_tensors(self) -> tuple[Tensor, ...]:
        base = cast(nn.Linear, self.base_layer)
        weight = base.weight.T if is_transposed(self) else base.weight
        return (weight,) if base.bias is None else (weight, base.bias)

    def _base_can_be_fused(self, x: Tensor) -> bool:
        """Whether the base layer is nothing but a frozen weight and bias in x's dtype.

        Anything that happens in its call (quantization, a subclass, hooks, offloaded or sharded weights) or a gradient
        of its own needs the call.
        """
        base = self.base_layer
        if self.quantization_backend is not None or type(base) not in (nn.Linear, Conv1D):
            return False
        if "forward" in base.__dict__:  # replaced, as accelerate does to load offloaded weights
            return False
        if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
            return False
        tensors = list(base.parameters(recurse=False))
        if any(type(t) is not nn.Parameter or t.requires_grad or t.device != x.device for t in tensors):
            return False
        return torch.is_autocast_enabled(x.device.type) or all(t.dtype == x.dtype for t in tensors)


def _in_opacus(adapter: BoraAdapter) -> bool:
    """Whether Opacus' hooks watch the adapter: they take the batch size from its last input, which must then be x."""
    return any(hasattr(parameter, "grad_sample") for parameter in adapter.parameters())
