"""What stands beside a finished adapter's weights, so that its folder is enough to load it and predict with it.

``labels.json`` lists the label names in the order of the logits, ``bora_fl.json`` holds the settings of model and
adapter, and the tokenizer has its own files.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bora_fl.blocks import at_rank
from bora_fl.config import ConfigError, Settings, parse
from bora_fl.models.base import load_base
from bora_fl.models.federated import FederatedModel
from bora_fl.paths import write_atomically
from bora_fl.state import AdapterState, unflatten_deltas

ABOUT, LABELS, WEIGHTS = "bora_fl.json", "labels.json", "adapter_model.safetensors"
_KEPT = (
    "model.",
    "adapter.",
    "run.seed",
    "data.format",
    "data.text-column",
    "data.response-column",
    "data.context-column",
    "data.rejected-column",
)


@dataclass(frozen=True)
class Result:
    """A finished adapter.

    Attributes:
        folder: Where its files are.
        settings: Its model and adapter; the rest is at its defaults.
        label_names: The class names, in the order of the logits; None for a language model.
        round: The last round that is in it.
    """

    folder: Path
    settings: Settings
    label_names: list[str] | None
    round: int


def write_result(folder: Path, tokenizer: Any, settings: Settings, label_names: list[str] | None, round: int) -> None:
    """Complete an adapter's folder with the tokenizer, the label names and the settings that loading it needs.

    Args:
        folder: Where the adapter's weights are.
        tokenizer: The model's.
        settings: The run's.
        label_names: The class names; None where there are none.
        round: The last round that is in the adapter.
    """
    tokenizer.save_pretrained(folder)
    write_labels(folder, label_names)
    kept = {key: value for key, value in settings.flat().items() if key.startswith(_KEPT)}
    if (local := Path(settings.model.name).expanduser()).exists():
        kept["model.name"] = str(local.absolute())
    write_atomically(folder / ABOUT, json.dumps({"format": 1, "round": round, "settings": kept}, indent=2) + "\n")


def write_labels(folder: Path, label_names: list[str] | None) -> None:
    """Write the label names, if there are any, into a folder."""
    if label_names is not None:
        write_atomically(folder / LABELS, json.dumps(label_names, ensure_ascii=False) + "\n")


def read_labels(folder: Path) -> list[str] | None:
    """The label names of a run's output folder, or of a finished adapter's; None if there are none."""
    path = folder / LABELS
    return [str(name) for name in json.loads(path.read_text(encoding="utf8"))] if path.is_file() else None


def read_result(folder: Path) -> Result | None:
    """What a folder says of its adapter; None if it holds no finished adapter.

    Args:
        folder: A run's output folder, or the folder ``adapter`` in it.

    Raises:
        ConfigError: If what it says cannot be read.
    """
    for place in (folder / "adapter", folder):
        if (place / ABOUT).is_file():
            try:
                about = json.loads((place / ABOUT).read_text(encoding="utf8"))
                return Result(place, parse(about["settings"]), read_labels(place), int(about["round"]))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise _damaged(place, f"{ABOUT} or {LABELS}", error) from error
    return None


def _damaged(folder: Path, what: str, error: Exception) -> ConfigError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return ConfigError(
        f"{folder}: {what} cannot be used ({reason}); it is damaged, or of another version: restore it from a backup, "
        "or delete the folder and resume the run (run.resume=true), which writes it again from its last checkpoint"
    )


def result_tokenizer(result: Result) -> Any:
    """The tokenizer of a finished adapter.

    Raises:
        ConfigError: If its files are missing or damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(result.folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(result.folder, "the tokenizer", error) from error


def load_result(
    result: Result,
    base: str = "",
    *,
    quantized: bool = True,
    at: tuple[AdapterState, Sequence[Mapping[str, Tensor]]] | None = None,
) -> FederatedModel:
    """The base model with the adapter and all that was folded into its weights, on the CPU.

    Args:
        result: From `read_result`.
        base: Another place of the same base model, as for ``model.name``.
        quantized: With the weights as the run's ``model.quantization`` has them; else in full precision.
        at: Another state of the same adapter, and the folds up to it, such as a checkpoint's.

    Raises:
        ConfigError: If the base model cannot be loaded, or the adapter's files are missing or damaged.
    """
    settings = result.settings
    model = settings.model.model_copy(update={"name": base} if base else {})
    if not quantized:
        model = model.model_copy(update={"quantization": "none"})
    weights, seed = load_base(model, result.label_names, settings.run.seed), settings.run.seed
    loaded = FederatedModel(weights, settings.adapter, model, seed, keep_head=at is not None)
    if at is not None:
        state, earlier = at
        for fold in earlier:
            loaded.add_to_base(unflatten_deltas(fold))
        adapter = settings.adapter  # a strategy's state may be of a lower rank
        layers = {name: at_rank(f, adapter.rank, adapter.transform) for name, f in state.layers.items()}
        own = loaded.read().tensors  # a head that does not train is in the state only where it was solved
        loaded.write(AdapterState(layers, {**own, **state.tensors}))
        return loaded
    try:
        _read_weights(loaded, result.folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _damaged(result.folder, "the weights", error) from error
    return loaded


def _read_weights(loaded: FederatedModel, folder: Path) -> None:
    folds = folder / "folds.safetensors"
    if folds.is_file():
        flat = load_file(folds)
        for version in sorted({int(name.partition("/")[0]) for name in flat}):
            loaded.add_to_base(unflatten_deltas(flat, f"{version}/"))
    absent: set[str] | None = None
    if loaded.adapter.method == "full":
        for file in sorted(folder.glob("model*.safetensors")):  # a large model lies in several
            lacking = set(loaded.model.load_state_dict(load_file(file), strict=False).missing_keys)
            absent = lacking if absent is None else absent & lacking
        if absent is None:
            raise FileNotFoundError("there is no model.safetensors")
    else:
        from peft import load_peft_weights, set_peft_model_state_dict

        if not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(f"there is no {WEIGHTS}")
        weights = load_peft_weights(str(folder), device="cpu")
        absent = set(set_peft_model_state_dict(loaded.model, weights).missing_keys)
    missing = [names[0] for names in _trained_names(loaded.model) if absent.issuperset(names)]
    if missing:
        raise ValueError(f"{', '.join(missing[:3])} ({len(missing)} in all) are missing")


def _trained_names(model: Any) -> Iterator[list[str]]:
    """The names of each parameter that was trained; tied ones have several, and PEFT loads prompts apart."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and not name.startswith("prompt_encoder."):
            names.setdefault(id(parameter), []).append(name)
    yield from names.values()


def load(folder: str | Path, base: str = "") -> tuple[Any, Any]:
    """A run's model, ready to predict, and its tokenizer.

    Args:
        folder: A run's output folder, or the folder ``adapter`` in it.
        base: Another place of the same base model, where the run's is not on this machine.

    Returns:
        The PEFT model (or the model, after full fine-tuning) in evaluation mode with the label names in its config, and
        the tokenizer.

    Raises:
        ConfigError: If the folder holds no finished adapter, or the base model cannot be loaded.
    """
    result = read_result(Path(folder).expanduser())
    if result is None:
        raise ConfigError(f"{folder}: there is no adapter with a {ABOUT}; name the output folder of a finished run")
    return load_result(result, base).model.eval(), result_tokenizer(result)
