"""Conversion of a BoRA adapter to a LoRA adapter, exact or of a given rank, for programs that know LoRA only.

With row blocks B_i of B and column blocks A_j of A, `delta_W[i, j] = scaling · B_i diag(Sigma[i, j]) A_j` is the
product of `lora_B [m, b·r]`, whose row block i is `scaling · [B_i Sigma_i1 … B_i Sigma_ib]`, and
`lora_A [b·r, n] = blockdiag(A_1, …, A_b)`: LoRA of rank b·r, with nothing lost. A lower rank R is the truncated SVD of
that product, the closest in the Frobenius norm (Eckart and Young), found without forming it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from bora_fl.blocks import BlockFactors, refactorize

from .base_weight import is_transposed
from .config import BoraConfig
from .state import named_layers, read_factors

_PREFIX = "base_model.model."  # of every key in a saved PEFT adapter


def adapter_to_lora(
    model: PeftModel, adapter_name: str = "default", *, dtype: torch.dtype | None = None, rank: int | None = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return the LoRA adapter that computes what a BoRA adapter computes, or the closest one of a given rank.

    All layers get one rank, by default the largest b·r, padded with zeros, with `lora_alpha = r` and the scaling in
    lora_B: servers ignore rank and alpha patterns, and some read the alpha alone. Modules that are trained beside the
    adapters, and biases, come along unchanged.

    Args:
        model: A model with BoRA adapters.
        adapter_name: The adapter to convert.
        dtype: Of the factors returned; by default the adapter's. They are computed in float32 at least.
        rank: Of the result, at least 1; layers of a higher one are truncated, see `lora_error`.

    Returns:
        The settings and the tensors as PEFT saves them (`lora_A.weight [R, n]`, `lora_B.weight [m, R]`), on the CPU.

    Raises:
        ValueError: The model has no BoRA adapter of this name, or the rank is below 1.
    """
    factors = read_factors(model, adapter_name)
    config: BoraConfig = model.peft_config[adapter_name]
    if rank is None:
        rank = max(f.num_blocks * f.rank for f in factors.values())
    layers = dict(named_layers(model, adapter_name))
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    state = {key: value.detach().cpu().clone() for key, value in saved.items() if ".bora_adapter." not in key}
    for name, layer_factors in factors.items():
        kept = dtype or layer_factors.A.dtype
        lora_B, lora_A = _as_lora(layer_factors, rank)[0].to_lora()
        missing = rank - lora_A.shape[0]
        lora_A = torch.nn.functional.pad(lora_A, (0, 0, 0, missing))
        lora_B = torch.nn.functional.pad(lora_B, (0, missing))
        state[f"{_PREFIX}{name}.lora_A.weight"] = lora_A.to("cpu", kept).contiguous()
        state[f"{_PREFIX}{name}.lora_B.weight"] = lora_B.to("cpu", kept).contiguous()
    others = {name for name, _ in model.get_base_model().named_modules()} - factors.keys()
    lora_config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(_shortest_targets(factors, others)),
        modules_to_save=config.modules_to_save,
        bias="lora_only" if config.bias == "bora_only" else config.bias,
        fan_in_fan_out=any(is_transposed(layer) for layer in layers.values()),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    return lora_config, state


def save_as_lora(
    model: PeftModel,
    folder: str | Path,
    adapter_name: str = "default",
    *,
    dtype: torch.dtype | None = None,
    rank: int | None = None,
) -> Path:
    """Write a BoRA adapter as a LoRA adapter folder, `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        model: A model with BoRA adapters.
        folder: Where to write; made if it does not exist.
        adapter_name: The adapter to convert.
        dtype: Of the factors written; by default the adapter's.
        rank: See `adapter_to_lora`.

    Returns:
        The folder.

    Raises:
        ValueError: The model has no BoRA adapter of this name.
    """
    config, state = adapter_to_lora(model, adapter_name, dtype=dtype, rank=rank)
    beside = sorted(key for key in state if not key.endswith((".lora_A.weight", ".lora_B.weight")))
    if beside:
        warnings.warn(
            f"The LoRA adapter carries {len(beside)} tensors beside its factors ({beside[0]}, …). PEFT loads them; "
            "vLLM, SGLang and llama.cpp do not: merge the model for those.",
            stacklevel=2,
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return folder


def lora_error(model: PeftModel, rank: int, adapter_name: str = "default") -> float:
    """What a LoRA adapter of a rank loses: `‖M − M_R‖ / ‖M‖` in the Frobenius norm, over all layers' updates together.

    Args:
        model: A model with BoRA adapters.
        rank: Of the LoRA adapter, at least 1.
        adapter_name: The adapter to convert.

    Raises:
        ValueError: The model has no BoRA adapter of this name, or the rank is below 1.
    """
    lost = whole = 0.0
    for factors in read_factors(model, adapter_name).values():
        energy = factors.norm() ** 2
        lost, whole = lost + _as_lora(factors, rank)[1] ** 2 * energy, whole + energy
    return math.sqrt(lost / whole) if whole else 0.0


def _as_lora(factors: BlockFactors, rank: int) -> tuple[BlockFactors, float]:
    """One block of at most a rank with the same update, exactly or as closely as can be, and its relative error."""
    if rank < 1:
        raise ValueError(f"rank is {rank}; a LoRA adapter has rank 1 or more")
    wide = BlockFactors(_widen(factors.B), _widen(factors.sigma), _widen(factors.A), factors.scaling)
    lora_B, lora_A = wide.to_lora()
    lora = BlockFactors(lora_B, lora_B.new_ones(1, 1, len(lora_A)), lora_A)
    if lora.rank <= rank:
        return lora, 0.0
    fit = refactorize(lora, rank)
    return fit.factors, fit.relative_error


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _shortest_targets(names: Collection[str], others: Collection[str]) -> Collection[str]:
    """Return the last parts of the names if they select just these modules, else the full names."""
    suffixes = {name.rpartition(".")[2] for name in names}
    return names if suffixes & {name.rpartition(".")[2] for name in others} else suffixes
