"""Put another adapter's weights in the place of one that is loaded, as `peft.utils.hotswap` does for LoRA."""

from pathlib import Path
from typing import Any

import torch

from .config import BoraConfig

_SAME = ("r", "num_blocks", "sigma_transform", "rank_pattern", "target_modules", "modules_to_save", "bias")


def hotswap_adapter(model: Any, folder: str | Path, adapter_name: str = "default") -> None:
    """Load an adapter in place: the tensors stay the same objects, so a compiled model is not compiled again.

    Args:
        model: A PEFT model with a BoRA adapter, which is not merged.
        folder: Where `save_pretrained` has written another BoRA adapter of the same base model.
        adapter_name: The adapter that is replaced.

    Raises:
        ValueError: If the adapters differ in rank, blocks, transform, layers or scale, or the adapter is merged;
            nothing is changed.
    """
    from peft import PeftConfig, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    ours, other = model.peft_config.get(adapter_name), PeftConfig.from_pretrained(str(folder))
    if not isinstance(ours, BoraConfig) or not isinstance(other, BoraConfig):
        raise ValueError(f"hotswap_adapter: {adapter_name!r} and {folder} must both be BoRA adapters")
    for name in (*_SAME, "bora_alpha", "use_rslora", "alpha_pattern"):
        have, new = (_comparable(getattr(config, name)) for config in (ours, other))
        if have != new:
            raise ValueError(
                f"hotswap_adapter: {name} is {have!r}, that of {folder} {new!r}; load it as another adapter"
            )
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise ValueError("hotswap_adapter: the adapter is merged; call unmerge_adapter() first")
    weights = load_peft_weights(str(folder), device="cpu")
    held = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    others = weights.keys() - held.keys() - model.state_dict().keys()  # a file may have the embeddings beside
    if differing := sorted((held.keys() - weights.keys()) | others):
        raise ValueError(
            f"hotswap_adapter: the layers differ, {differing[0]} is in "
            f"{'the model' if differing[0] in held else folder} alone; load it as another adapter"
        )
    if misfits := [name for name in held if held[name].shape != weights[name].shape]:
        have, new = (list(tensors[misfits[0]].shape) for tensors in (held, weights))
        raise ValueError(f"hotswap_adapter: {misfits[0]} is {have}, that of {folder} {new}; load it as another adapter")
    if wrong := [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]:
        raise ValueError(f"hotswap_adapter: {wrong[0]} of {folder} is not finite")
    set_peft_model_state_dict(model, weights, adapter_name=adapter_name)


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | list | tuple) else value
