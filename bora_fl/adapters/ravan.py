"""Trained cores between frozen bases: RAVAN's heads, and block pairs with a dense core, as a PEFT method.

`structure = "heads"`: `delta_W = scaling · Σ_h s_h B_h H_h A_h` over h heads of rank r (RAVAN: Multi-Head Low-Rank
Adaptation for Federated Fine-Tuning; Raje et al.; NeurIPS 2025, arXiv:2506.05568). What differs: every client trains
all heads, where the paper lets a weak one choose some.
`structure = "blocks"`: `delta_W[i, j] = scaling · s_ij B_i H_ij A_j` over b × b blocks: BoRA's form with a dense core
in the place of `diag(Sigma[i, j])`. One head, and one block, are Fed-SB (arXiv:2502.15436).

B and A are drawn once, orthonormal (heads against each other too, as long as `h·r` directions exist), and never
trained; H starts at 0 and s at 1, so that the adapted model starts equal to the base model. Only `s ∘ H` matters, and
delta_W is linear in it: where all clients have the same bases, the mean of `s ∘ H` is the mean of delta_W.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .base_weight import add_to_base, as_stored
from .peft_type import RAVAN

Structure = Literal["heads", "blocks"]


@dataclass
class RavanConfig(PeftConfig):  # type: ignore[misc]
    """Settings of trained cores between frozen bases.

    Args:
        r: Size of a core.
        num_heads: Heads h, or with `structure="blocks"` row blocks and column blocks b.
        structure: `"heads"` or `"blocks"`.
        ravan_alpha: The update is scaled by `ravan_alpha / r`.
        ravan_dropout: Probability with which an input of the branch is dropped while training, in [0, 1).
        target_modules: Names to adapt: a list of suffixes, a regular expression, or `"all-linear"`.
        modules_to_save: Modules beside the adapters that are trained and saved, such as a classification head.

    Raises:
        ValueError: A setting is out of its range. The message names the field, the value and the remedy.
    """

    r: int = field(default=8, metadata={"help": "Size of a core."})
    num_heads: int = field(default=4, metadata={"help": "Heads, or blocks a side."})
    structure: str = field(default="heads", metadata={"help": "heads or blocks."})
    ravan_alpha: float = field(default=8, metadata={"help": "The update is scaled by ravan_alpha / r."})
    ravan_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the branch."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Suffixes, a regular expression, or 'all-linear'."}
    )
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = RAVAN
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        for name in ("r", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is not a positive integer; use 1 or more.")
        if self.structure not in get_args(Structure):
            raise ValueError(f"structure={self.structure!r} is unknown; use one of {', '.join(get_args(Structure))}.")
        if not self.ravan_alpha > 0 or not 0 <= self.ravan_dropout < 1:
            raise ValueError(
                f"ravan_alpha={self.ravan_alpha!r}, ravan_dropout={self.ravan_dropout!r} are out of range; use an alpha"
                " above 0 and a probability in [0, 1)."
            )


class RavanCores(nn.Module):
    """What is trained: `z_h = s_h H_h u_h` for heads, `z_i = Σ_j s_ij H_ij u_j` for blocks.

    Attributes:
        H: `[h, r, r]` or `[b, b, r, r]`.
        scales: `[h]` or `[b, b]`.
    """

    def __init__(self, rank: int, num_heads: int, structure: Structure) -> None:
        super().__init__()
        pairs = (num_heads,) if structure == "heads" else (num_heads, num_heads)
        self.H = nn.Parameter(torch.zeros(*pairs, rank, rank))
        self.scales = nn.Parameter(torch.ones(pairs))

    def forward(self, u: Tensor) -> Tensor:
        """Map `u [..., h, r]` to `z [..., h, r]`, in u's dtype."""
        form = "...hr,hsr->...hs" if self.H.dim() == 3 else "...jr,ijsr->...is"
        return torch.einsum(form, u, self.scaled().to(u.dtype))

    def scaled(self) -> Tensor:
        """The cores with their scales, `s ∘ H`."""
        return self.H * self.scales[..., None, None]


class RavanBases(nn.Module):
    """One layer's frozen bases, and the branch that they make of its cores.

    Attributes:
        right: `[h, r, n]` for heads, `[b, r, n/b]` for blocks: orthonormal rows.
        left: `[h, m, r]` for heads, `[b, m/b, r]` for blocks: orthonormal columns.
    """

    right: Tensor
    left: Tensor

    def __init__(self, in_features: int, out_features: int, config: RavanConfig) -> None:
        super().__init__()
        r, h = config.r, config.num_heads
        self.structure = cast(Structure, config.structure)
        self.scaling, self.dropout_p = config.ravan_alpha / r, config.ravan_dropout
        n, m = (size if self.structure == "heads" else size // h for size in (in_features, out_features))
        if self.structure == "blocks" and (in_features % h or out_features % h):
            raise ValueError(f"num_heads={h} blocks must divide {out_features} rows and {in_features} columns.")
        if r > min(n, m):
            raise ValueError(f"r={r} with bases of {m} rows and {n} columns; use at most {min(n, m)}.")
        against = self.structure == "heads"
        self.register_buffer("right", orthonormal(h, n, r, against).mT.contiguous())
        self.register_buffer("left", orthonormal(h, m, r, against))

    def forward(self, x: Tensor, cores: RavanCores) -> Tensor:
        """The branch's output `[..., m]` for `x [..., n]`."""
        A, B = self.right, self.left
        x = nn.functional.dropout(x.to(A.dtype), self.dropout_p, self.training)
        if self.structure == "heads":
            u = (x @ A.flatten(0, 1).T).reshape(*x.shape[:-1], *A.shape[:2])
            z = cores(u)
            y: Tensor = z.flatten(-2) @ B.mT.flatten(0, 1)
            return self.scaling * y
        u = torch.einsum("...jp,jrp->...jr", x.reshape(*x.shape[:-1], len(A), A.shape[2]), A)
        return self.scaling * torch.einsum("...ir,iqr->...iq", cores(u), B).flatten(-2)

    @torch.no_grad()
    def delta(self, cores: RavanCores) -> Tensor:
        """The update itself, `[m, n]`, in float32 at least."""
        wide = torch.promote_types(self.right.dtype, torch.float32)
        A, B, H = self.right.to(wide), self.left.to(wide), cores.scaled().to(wide)
        if self.structure == "heads":
            return self.scaling * torch.einsum("hmr,hrs,hsn->mn", B, H, A)
        b, q, p = len(A), B.shape[1], A.shape[2]
        return self.scaling * torch.einsum("iqs,ijsr,jrp->iqjp", B, H, A).reshape(b * q, b * p)


def orthonormal(heads: int, size: int, rank: int, against: bool) -> Tensor:
    """Random bases `[heads, size, rank]` of orthonormal columns.

    Args:
        heads: How many. size: Of the space. rank: Columns of each, at most `size`.
        against: Orthogonal to each other as well, while `heads · rank` directions exist in the space.
    """
    if against and heads * rank <= size:
        joint: Tensor = torch.linalg.qr(torch.randn(size, heads * rank, dtype=torch.float64)).Q
        return joint.float().reshape(size, heads, rank).transpose(0, 1).contiguous()
    bases: Tensor = torch.linalg.qr(torch.randn(heads, size, rank, dtype=torch.float64)).Q
    return bases.float()


class RavanLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer with such adapters: for every adapter name, bases in `ravan_bases` and cores in `ravan_cores`."""

    adapter_layer_names = ("ravan_cores",)
    other_param_names = ("ravan_bases",)

    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.quantization_backend = base_layer, None
        self.ravan_bases, self.ravan_cores = nn.ModuleDict(), nn.ModuleDict()
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    def bases(self, adapter_name: str) -> RavanBases:
        """Return the named adapter's bases."""
        return cast(RavanBases, self.ravan_bases[adapter_name])

    def cores(self, adapter_name: str) -> RavanCores:
        """Return the named adapter's cores."""
        return cast(RavanCores, self.ravan_cores[adapter_name])

    def delta(self, adapter_name: str) -> Tensor:
        """Return the named adapter's update `[m, n]`."""
        return self.bases(adapter_name).delta(self.cores(adapter_name))

    def update_layer(self, adapter_name: str, config: RavanConfig) -> None:
        """Add an adapter."""
        bases = RavanBases(self.in_features, self.out_features, config).train(self.training)
        self.ravan_bases[adapter_name] = bases
        self.ravan_cores[adapter_name] = RavanCores(config.r, config.num_heads, bases.structure)
        right, left = bases.right, bases.left
        self._move_adapter_to_device_of_base_layer(adapter_name)
        # Over a base in half precision PEFT takes the cores back to float32, but no buffers; rounded, the bases would
        # not be orthonormal.
        like = bases.right.new_empty(0, dtype=torch.promote_types(bases.right.dtype, torch.float32))
        bases.right, bases.left = right.to(like), left.to(like)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return the adapter's update in the layout of the base weight."""
        return as_stored(self, self.delta(adapter_name))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of the named (by default: the active) adapters to the base weight.

        Raises:
            ValueError: With `safe_merge`, if the sum is not finite; the weight is then as it was.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.ravan_cores:
                add_to_base(self, self.delta(name), finite=safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract the merged updates from the base weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            add_to_base(self, -self.delta(self.merged_adapters.pop()))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus the active adapters' branches.

        Raises:
            ValueError: If each row is to have an adapter of its own, which this method has no form for.
        """
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names: RAVAN has no form for one adapter a row; leave it out.")
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.ravan_cores:
                result = result + self.bases(name)(x, self.cores(name)).to(result.dtype)
        return result

    def __repr__(self) -> str:
        return "ravan." + super().__repr__()


class RavanModel(BaseTuner):  # type: ignore[misc]
    """A model with such adapters, made by `peft.get_peft_model(model, RavanConfig(...))`."""

    prefix: str = "ravan_"
    tuner_layer_cls = RavanLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        config: RavanConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if isinstance(target, RavanLayer):
            target.update_layer(adapter_name, config)
            return
        if not isinstance(target, nn.Linear | Conv1D):
            raise TypeError(
                f"Target module {current_key!r} is a {type(target).__name__}; RAVAN adapts torch.nn.Linear and "
                "transformers' Conv1D. Name other targets."
            )
        layer = RavanLayer(target)
        layer.train(target.training)
        layer.set_adapter([adapter_name])
        layer.update_layer(adapter_name, config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
