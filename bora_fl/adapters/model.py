"""The PEFT tuner: which modules of a model get BoRA adapters."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import BoraConfig
from .layer import BoraLayer
from .mixed_batch import rows_with_adapters
from .state import named_layers, read_factors, write_factors
from .weighted import check_request, weighted_factors

_MODULES_SHOWN = 5


class BoraModel(BaseTuner):  # type: ignore[misc]
    """A model with BoRA adapters, made by `peft.get_peft_model(model, BoraConfig(...))`.

    Args:
        model: The model to adapt.
        config: The settings.
        adapter_name: Name of the adapter.
        low_cpu_mem_usage: Create the adapter's weights on the meta device, to be loaded later.

    Raises:
        ValueError: `num_blocks` does not divide the sizes of a targeted weight. The model is left as it was.
        TypeError: A targeted module is not a linear layer.
    """

    prefix: str = "bora_"
    tuner_layer_cls = BoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around every call of the model by PEFT: `adapter_names` gives each row of the batch an adapter of its own."""
        names, beams = kwargs.get("adapter_names"), kwargs.get("num_beams")
        if kwargs.get("alora_offsets") is not None:
            raise ValueError("alora_offsets is for activated LoRA; BoRA has no such form, so leave it out.")
        if names is None:
            yield
            return
        known = {name for layer in self.modules() if isinstance(layer, BoraLayer) for name in layer.bora_adapter}
        with rows_with_adapters(self.model, BoraLayer, known, names, beams if isinstance(beams, int) else 1):
            yield

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "refactorize",
        rank: int | None = None,
    ) -> None:
        """Add an adapter whose update is the weighted sum of others' updates.

        Its Sigma is free (`sigma_transform="identity"`), since a sum leaves the range of `exp_norm`. It is not active.

        Args:
            adapters: The adapters to sum, of one `num_blocks`; ranks, scalings and layers may differ.
            weights: One for each; negative ones subtract.
            adapter_name: Of the new adapter. If there is one of this name, nothing happens, as in PEFT.
            combination_type: `"refactorize"`, the closest factors of a rank, or `"cat"`, exact, ranks added up.
            rank: With `"refactorize"`; by default the largest among a layer's adapters.

        Raises:
            ValueError: An argument is wrong, or an adapter trains modules beside its factors.
        """
        if adapter_name in self.peft_config:
            return
        check_request(self.peft_config, adapters, weights, combination_type)
        by_adapter = {name: read_factors(self, name) for name in adapters}
        factors = weighted_factors(by_adapter, dict(zip(adapters, weights, strict=True)), combination_type, rank)
        ranks = {layer: found.rank for layer, found in factors.items()}
        patterns = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items()}  # a whole name: "0" ends "1.0" too
        first: BoraConfig = self.peft_config[adapters[0]]
        self.peft_config[adapter_name] = replace(
            first,
            r=max(ranks.values()),
            bora_alpha=max(ranks.values()),
            use_rslora=False,
            rank_pattern=patterns,
            alpha_pattern=dict(patterns),
            target_modules="|".join(map(re.escape, sorted(ranks))),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            sigma_transform="identity",
            sigma_init="auto",
        )
        self.inject_adapter(self.model, adapter_name)
        for layer, module in named_layers(self, adapter_name):  # PEFT gives it the base's dtype, which may be narrower
            module.adapter(adapter_name).to(factors[layer].A.dtype)
        write_factors(self, factors, adapter_name)

    def _prepare_model(self, peft_config: BoraConfig, model: nn.Module) -> None:
        """Check every target before the first module is replaced."""
        peft_config = _maybe_include_all_linear_layers(peft_config, model)
        shapes = {}
        adapted: tuple[str, ...] = ()  # prefixes of what lies inside layers that have adapters already
        for name, module in model.named_modules():
            if not name or name.startswith(adapted):
                continue
            if isinstance(module, BaseTunerLayer):
                adapted += (name + ".",)
            if self._check_target_module_exists(peft_config, name) and _is_supported(_base_of(module), self.model):
                n, m = _get_in_out_features(_base_of(module))
                shapes[name] = (m, n)
        _check_blocks_divide(peft_config.num_blocks, shapes)

    def _create_and_replace(
        self,
        bora_config: BoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if isinstance(parent, nn.MultiheadAttention):
            raise TypeError(
                f"Target module {current_key!r} belongs to nn.MultiheadAttention, which reads its weight without "
                "calling it, so that an adapter would have no effect; leave it out with exclude_modules."
            )
        rank_key = get_pattern_key(bora_config.rank_pattern.keys(), current_key)
        alpha_key = get_pattern_key(bora_config.alpha_pattern.keys(), current_key)
        rank = bora_config.rank_pattern.get(rank_key, bora_config.r)
        alpha = bora_config.alpha_pattern.get(alpha_key, bora_config.bora_alpha)
        if isinstance(target, BoraLayer):
            target.update_layer(adapter_name, bora_config, rank, alpha)
            return
        if not _is_supported(_base_of(target), self.model):
            raise TypeError(
                f"Target module {current_key!r} is a {type(_base_of(target)).__name__}; BoRA adapts torch.nn.Linear, "
                "transformers' Conv1D and quantized linear layers. Name other targets, or leave this one out with "
                "exclude_modules."
            )
        layer = BoraLayer(target, **get_quantization_kwargs(self.model))
        layer.train(target.training)
        layer.set_adapter([adapter_name])
        layer.update_layer(adapter_name, bora_config, rank, alpha)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an adapter added beside an active one waits to be activated
        self._replace_module(parent, target_name, layer, target)


def _base_of(module: nn.Module) -> nn.Module:
    base: nn.Module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return base


def _is_supported(module: nn.Module, model: nn.Module) -> bool:
    if isinstance(module, nn.Linear | Conv1D):
        return True
    backend = resolve_quantization_backend(module, **get_quantization_kwargs(model))
    return backend is not None and backend.layer_type == "linear"


def _check_blocks_divide(num_blocks: int, shapes: dict[str, tuple[int, int]]) -> None:
    """Raise a ValueError if `num_blocks` does not divide both sizes of every weight `[m, n]`, by module name."""
    misfits = {name: shape for name, shape in shapes.items() if any(size % num_blocks for size in shape)}
    if not misfits:
        return
    common = math.gcd(*(size for shape in shapes.values() for size in shape))
    shown = [f"{name!r} {list(shape)} ({_divisors(math.gcd(*shape))})" for name, shape in misfits.items()]
    if len(shown) > _MODULES_SHOWN:
        shown[_MODULES_SHOWN:] = [f"and {len(shown) - _MODULES_SHOWN} more"]
    raise ValueError(
        f"num_blocks={num_blocks} must divide both sizes of every targeted weight [out_features, in_features], but "
        f"does not fit {len(misfits)} of {len(shapes)} modules (divisors that fit in parentheses): {', '.join(shown)}. "
        f"Divisors that fit all targeted modules: {_divisors(common)}. Set num_blocks to one of these, or leave the "
        "modules out with exclude_modules."
    )


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
