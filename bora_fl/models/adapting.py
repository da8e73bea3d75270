"""Put an adapter on a base model, as the settings describe it."""

from typing import Any

import torch

from bora_fl.config import AdapterSettings, ConfigError, ModelSettings
from bora_fl.seeds import derive

# Methods of trained cores between frozen bases, by what `adapter.num-blocks` counts.
CORE_STRUCTURES = {"ravan": "heads", "dense-core": "blocks"}


def peft_config(adapter: AdapterSettings, model: ModelSettings) -> Any:
    """The PEFT config that the settings describe.

    Raises:
        ConfigError: For a method PEFT does not know, or values that its config refuses.
    """
    import peft

    from bora_fl.adapters import BoraConfig, RavanConfig

    common: dict[str, Any] = {"task_type": model.kind.peft, "target_modules": adapter.targets()}
    if whole := adapter.whole_modules():
        common["modules_to_save"] = whole
    method = adapter.method.lower()
    try:
        if method == "bora":
            return BoraConfig(
                r=adapter.rank,
                num_blocks=adapter.num_blocks,
                bora_alpha=adapter.alpha,
                bora_dropout=adapter.dropout,
                use_rslora=adapter.rslora,
                sigma_transform=adapter.sigma_transform,
                **common,
            )
        if method in CORE_STRUCTURES:
            return RavanConfig(
                r=adapter.rank,
                num_heads=adapter.num_blocks,
                structure=CORE_STRUCTURES[method],
                ravan_alpha=adapter.alpha,
                ravan_dropout=adapter.dropout,
                **common,
            )
        if method in {"lora", "dora"}:
            return peft.LoraConfig(
                r=adapter.rank,
                lora_alpha=adapter.alpha,
                lora_dropout=adapter.dropout,
                use_rslora=adapter.rslora,
                use_dora=method == "dora",
                **common,
            )
        kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(getattr(peft.PeftType, method.upper(), None))
        if kind is None:
            known = sorted(str(t.value).lower() for t in peft.PEFT_TYPE_TO_CONFIG_MAPPING)
            raise ConfigError(
                f"adapter.method = {adapter.method!r}: PEFT knows {', '.join(known)}, dora, dense-core; or use full"
            )
        fields = kind.__dataclass_fields__
        rank = {"r": adapter.rank} if "r" in fields else {}
        alpha = {name: adapter.alpha for name in ("alpha", f"{method}_alpha") if name in fields}
        return kind(**common, **rank, **alpha)
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"adapter.* for method {adapter.method!r}: {error}") from error


def adapted(base: Any, adapter: AdapterSettings, model: ModelSettings, seed: int) -> Any:
    """The PEFT model of a base model and a fresh adapter, with what is to be trained or saved beside it.

    Args:
        base: The base model.
        adapter: Of any method but ``full``.
        model: Its task.
        seed: Run seed: a fresh adapter is the same in every process.

    Raises:
        ConfigError: If the model has no such modules, or the adapter does not fit them.
    """
    from peft import get_peft_model

    from bora_fl.adapters.base_weight import untie

    config = peft_config(adapter, model)
    heads, drawn = _beside_the_body(base, config) if model.kind.head else ([], [])
    if heads or drawn:
        config.modules_to_save = [*(config.modules_to_save or []), *heads, *drawn]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "adapter"))
        try:
            found = get_peft_model(base, config)
        except ValueError as error:
            if "No modules were targeted" in str(error) or "not found in the base model" in str(error):
                linear = {name.rpartition(".")[2] for name, m in base.named_modules() if _is_linear(m)}
                raise ConfigError(
                    f"adapter.target-modules = {adapter.target_modules!r}: no module of the base model has "
                    f"such a name; its linear layers are {', '.join(sorted(linear))}; name some, or all-linear"
                ) from error
            raise ConfigError(
                f"adapter.target-modules = {adapter.target_modules!r}, "
                f"adapter.num-blocks = {adapter.num_blocks}: {error}"
            ) from error
    _require_whole(found, adapter)
    untie(found)
    for name in drawn:  # saved with the adapter, since whoever loads the base model draws another
        found.get_submodule(f"base_model.model.{name}").requires_grad_(False)
    return found


def _beside_the_body(base: Any, config: Any) -> tuple[list[str], list[str]]:
    """A classifier's modules beside its body that PEFT neither trains nor saves by itself.

    PEFT trains what ends as `classifier` or `score`, `pre_classifier` among them, and leaves other heads, such as T5's
    and BART's `classification_head`, as they are drawn.

    Returns:
        Those that are its head, and, where PEFT knows the head, others that are neither adapted nor named in
        ``adapter.modules-to-save``, such as DeBERTa's pooler.
    """
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    body = getattr(base, "base_model_prefix", "")
    if not hasattr(base, body or "-"):
        return [], []
    found = [name for name, child in base.named_children() if name != body and any(True for _ in child.parameters())]
    known = [name for name in found if name.endswith(tuple(SEQ_CLS_HEAD_NAMES))]
    heads = [name for name in known or found if name not in SEQ_CLS_HEAD_NAMES]

    def is_adapted(name: str) -> bool:
        inside = [f"{name}.{inner}".rstrip(".") for inner, _ in base.get_submodule(name).named_modules()]
        return config.target_modules == "all-linear" or any(check_target_module_exists(config, i) for i in inside)

    others = [name for name in found if known and name not in known and name not in (config.modules_to_save or ())]
    return heads, [name for name in others if not is_adapted(name)]


def _require_whole(model: Any, adapter: AdapterSettings) -> None:
    """Refuse a name of ``adapter.modules-to-save`` that the model does not have: PEFT lets it pass.

    Raises:
        ConfigError: If no module goes by it.
    """
    found = {name for name, _ in model.named_modules() if name.endswith(".modules_to_save")}
    for wanted in adapter.whole_modules():
        if not any(name.removesuffix(".modules_to_save").endswith(wanted) for name in found):
            raise ConfigError(
                f"adapter.modules-to-save = {adapter.modules_to_save!r}: the model has no module {wanted!r}; name some "
                "of its modules, such as lm_head, or leave it empty"
            )


def _is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's, which is no nn.Linear
