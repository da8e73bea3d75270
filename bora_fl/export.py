"""A finished run as other programs want it: a merged model, a sentence-transformers folder, or a LoRA adapter."""

import json
from pathlib import Path
from typing import Any

from bora_fl.config import ConfigError, parse
from bora_fl.data import load_dataset
from bora_fl.models import FederatedModel, load_base, load_tokenizer
from bora_fl.models.pooling import PooledClassification
from bora_fl.models.saving import save_pooled, save_sentence_transformers
from bora_fl.server.checkpoint import load_newest
from bora_fl.state import unflatten_factors


def load_run(folder: Path) -> FederatedModel:
    """The base model with a run's folds in its weights and the run's newest adapter.

    Args:
        folder: The run's output folder.

    Raises:
        ConfigError: If it holds no run with a checkpoint.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise ConfigError(f"run.output-dir = '{folder}': there is no config.json; name the folder of a run")
    flat = json.loads(config.read_text())
    settings = parse(flat)
    checkpoint = load_newest(folder / "checkpoints", flat)
    if checkpoint is None:
        raise ConfigError(f"run.output-dir = '{folder}': there is no whole checkpoint; run at least one round")
    base = load_base(settings.model, load_dataset(settings.data).label_names, settings.run.seed)
    model = FederatedModel(base, settings.adapter, settings.model, settings.run.seed, keep_head=settings.solves_head)
    for fold in checkpoint.folds:
        model.add_to_base(unflatten_factors(fold, ""))
    model.write(checkpoint.state.current)
    return model


def export_merged(folder: Path, target: Path) -> Path:
    """Write the fine-tuned model with everything merged into its weights, and its tokenizer.

    A model with pooling (`model.pooling`) carries its class as code and is opened with ``trust_remote_code=True``.

    Args:
        folder: The run's output folder.
        target: The folder to write; `AutoModel…from_pretrained` opens it without PEFT and without this package.

    Returns:
        The target.
    """
    model, tokenizer = _merged(folder)
    if isinstance(model, PooledClassification):
        save_pooled(model, tokenizer, target)
    else:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    return target


def export_sentence_transformers(folder: Path, target: Path) -> Path:
    """Write the fine-tuned model for sentence-transformers: ``SentenceTransformer(target).encode(texts)`` are logits.

    Args:
        folder: The run's output folder.
        target: The folder to write.

    Raises:
        ConfigError: If the model's head reads something else than pooled token states.
    """
    model, tokenizer = _merged(folder)
    if not isinstance(model, PooledClassification):
        raise ConfigError(
            f"run.output-dir = '{folder}': {type(model).__name__} has a head of its own, which sentence-transformers "
            "does not know; export the merged model, or train with model.pooling = mean"
        )
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]  # type: ignore[attr-defined]
    save_sentence_transformers(model, tokenizer, target, names)
    return target


def _merged(folder: Path) -> tuple[Any, Any]:
    model = load_run(folder)
    settings = parse(json.loads((folder / "config.json").read_text()))
    merged = model.model if model.adapter.method == "full" else model.model.merge_and_unload()
    return merged, load_tokenizer(settings.model)


def export_lora(folder: Path, target: Path) -> Path:
    """Write a BoRA run's adapter as a LoRA adapter of rank b·r, exactly.

    Raises:
        ConfigError: If the run's adapter is not BoRA, or part of the result is in the frozen weights.
    """
    from bora_fl.adapters import save_as_lora

    if (folder / "adapter" / "folds.safetensors").is_file():
        raise ConfigError(
            f"run.output-dir = '{folder}': part of its result was folded into the frozen weights, which a LoRA adapter "
            "cannot carry; export the merged model instead"
        )
    model = load_run(folder)
    if model.adapter.method != "bora":
        raise ConfigError(f"adapter.method = '{model.adapter.method}': only BoRA adapters are converted; PEFT opens it")
    return save_as_lora(model.model, target)
