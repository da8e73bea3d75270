"""The configuration of a BoRA adapter, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from .peft_type import BORA
from .sigma import SIGMA_INITS, SIGMA_TRANSFORMS

_BIASES = ("none", "all", "bora_only")


@dataclass
class BoraConfig(PeftConfig):  # type: ignore[misc]
    """Settings of a BoRA adapter: `delta_W[i, j] = scaling · B_i diag(Sigma[i, j]) A_j` over b × b blocks.

    Source: Li et al., BoRA: Towards More Expressive Low-Rank Adaptation with Block Diversity, arXiv:2508.06953.

    Args:
        r: Rank of each block's product. The update as a whole reaches rank `r · num_blocks`.
        num_blocks: Row blocks and column blocks, b. Must divide both sizes of every targeted weight. 1 is LoRA.
        bora_alpha: The update is scaled by `bora_alpha / r`, or by `bora_alpha / sqrt(r)` with `use_rslora`.
        bora_dropout: Probability with which an input of the branch is dropped while training, in [0, 1).
        use_rslora: Scale by `bora_alpha / sqrt(r)`.
        target_modules: Names to adapt: a list of suffixes, a regular expression, or `"all-linear"` (every linear layer
            but the output layer). Left out, the architecture's usual LoRA targets.
        exclude_modules: Names to leave out, a list of suffixes or a regular expression.
        layers_to_transform: Indices of the layers to adapt, when `target_modules` is a list.
        layers_pattern: Name of the list that holds the layers, when `layers_to_transform` is given.
        rank_pattern: Ranks by module name or regular expression, where they differ from `r`.
        alpha_pattern: Alphas by module name or regular expression, where they differ from `bora_alpha`.
        modules_to_save: Modules beside the adapters that are trained and saved, such as a classification head.
        bias: Biases to train: `"none"`, `"all"`, or `"bora_only"` (those of adapted layers).
        fan_in_fan_out: Accepted so that LoRA settings for GPT-2 carry over. How a weight lies in memory is read from
            the type of its layer.
        init_weights: `True` starts with B = 0, so that the adapted model equals the base model. `False` draws B at
            random, which only tests need.
        sigma_transform: `"exp_norm"`, `Sigma = exp(sigma / mean|sigma|)`, or `"identity"`, `Sigma = sigma`.
        sigma_init: `"auto"`, `"ones"` (only with `"identity"`) or `"diverse"`; see
            `bora_fl.adapters.sigma.init_sigma_`.

    Raises:
        ValueError: A setting is out of its range. The message names the field, the value and the remedy.
    """

    r: int = field(default=8, metadata={"help": "Rank of each block's product."})
    num_blocks: int = field(
        default=8, metadata={"help": "Row and column blocks; must divide both sizes of each weight."}
    )
    bora_alpha: float = field(default=8, metadata={"help": "The update is scaled by bora_alpha / r."})
    bora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the branch."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by bora_alpha / sqrt(r) instead."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Suffixes, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Suffixes or a regular expression of modules to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Ranks that differ from r."})
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Alphas that differ from bora_alpha."}
    )
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})
    bias: str = field(default="none", metadata={"help": "Biases to train: none, all or bora_only."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Accepted; the layer's type decides."})
    init_weights: bool = field(default=True, metadata={"help": "Start equal to the base model."})
    sigma_transform: str = field(default="exp_norm", metadata={"help": "exp_norm or identity."})
    sigma_init: str = field(default="auto", metadata={"help": "auto, ones or diverse."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BORA
        # PEFT compares and saves targets as sets.
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self._check_numbers()
        self._check_choices()
        self._check_layer_selection()

    def scaling(self, rank: int, alpha: float) -> float:
        """Return the factor of the update for a layer of this rank and alpha."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def _check_numbers(self) -> None:
        _require_positive_int("r", self.r)
        _require_positive_int("num_blocks", self.num_blocks)
        _require_positive("bora_alpha", self.bora_alpha)
        for pattern, rank in self.rank_pattern.items():
            _require_positive_int(f"rank_pattern[{pattern!r}]", rank)
        for pattern, alpha in self.alpha_pattern.items():
            _require_positive(f"alpha_pattern[{pattern!r}]", alpha)
        if not (_is_number(self.bora_dropout) and 0.0 <= self.bora_dropout < 1.0):
            raise ValueError(f"bora_dropout={self.bora_dropout!r} is not a probability; use a number in [0, 1).")

    def _check_choices(self) -> None:
        _require_choice("bias", self.bias, _BIASES)
        _require_choice("sigma_transform", self.sigma_transform, SIGMA_TRANSFORMS)
        _require_choice("sigma_init", self.sigma_init, SIGMA_INITS)
        if not isinstance(self.init_weights, bool):
            raise ValueError(f"init_weights={self.init_weights!r} is not a switch; use True or False.")
        if self.sigma_init == "ones" and self.sigma_transform == "exp_norm":
            raise ValueError(
                "sigma_init='ones' cannot be reached by sigma_transform='exp_norm', whose mean|log Sigma| is always 1; "
                "use sigma_transform='identity' or sigma_init='auto'."
            )

    def _check_layer_selection(self) -> None:
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform; "
                "give the layer indices, or leave layers_pattern out."
            )
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} does not combine with target_modules={self.target_modules!r}; "
                    "list the target modules, or select the layers in the regular expression."
                )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_positive_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} is not a positive integer; use 1 or more.")


def _require_positive(name: str, value: Any) -> None:
    if not _is_number(value) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}={value!r} is not a positive number; use a finite value above 0.")


def _require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(choices)}.")
