"""A finished run in the forms that other programs take: a merged model, a GGUF file, a LoRA adapter, and so on.

None of them needs the training data: a run's folder holds what there is to know of it.
"""

from pathlib import Path
from typing import Any

import torch

from bora_fl.blocks import at_rank
from bora_fl.config import ConfigError, extras, parse, read_config
from bora_fl.data import load_dataset
from bora_fl.models import FederatedModel, Result, load_base, load_result, load_tokenizer, read_result
from bora_fl.models.generating import stop_ids
from bora_fl.models.pooling import PooledClassification
from bora_fl.models.result import ABOUT, read_labels, result_tokenizer, write_labels
from bora_fl.models.saving import save_pooled, save_sentence_transformers
from bora_fl.predicting.opening import rounds_of
from bora_fl.server.checkpoint import load_newest
from bora_fl.state import AdapterState, unflatten_deltas


def load_run(folder: Path, base: str = "", *, folded: bool = True) -> tuple[FederatedModel, Any]:
    """The base model with a run's folds in its weights and the run's newest adapter, and the tokenizer.

    The weights are in full precision, whatever ``model.quantization`` was. Of a run that has not ended, or goes on,
    the adapter is what it would end with now: that of least held-out loss so far, or without ``run.keep-best`` the
    newest.

    Args:
        folder: The run's output folder, or a finished adapter's.
        base: Another place of the same base model, as for ``model.name``.
        folded: Whether part of the result may be in the frozen weights.

    Raises:
        ConfigError: If it holds no run with an adapter or a checkpoint, or one with folds against `folded`.
    """
    result = read_result(folder)
    newest = max(rounds_of(folder), default=0)
    if result is not None and result.round >= newest:
        if not folded and (result.folder / "folds.safetensors").is_file():
            raise _folded(folder)
        return load_result(result, base, quantized=False), result_tokenizer(result)
    return _from_checkpoint(folder, result, base, folded)


def _folded(folder: Path) -> ConfigError:
    return ConfigError(
        f"run.output-dir = '{folder}': part of its result was folded into the frozen weights, which a LoRA adapter "
        "cannot carry; export the merged model instead"
    )


def _from_checkpoint(folder: Path, result: Result | None, base: str, folded: bool) -> tuple[FederatedModel, Any]:
    flat = read_config(folder)
    settings = parse(flat)
    checkpoint = load_newest(folder / "checkpoints", flat)
    if checkpoint is None:
        raise ConfigError(f"run.output-dir = '{folder}': there is no whole checkpoint; run at least one round")
    if checkpoint.folds and not folded:
        raise _folded(folder)
    named = settings.model.model_copy(update={"name": base or settings.model.name, "quantization": "none"})
    names = result.label_names if result else read_labels(folder)
    if names is None and settings.model.kind.head:
        names = load_dataset(settings.data).logit_names(settings.model)  # an older version's run
    weights = load_base(named, names, settings.run.seed)
    model = FederatedModel(weights, settings.adapter, named, settings.run.seed, keep_head=settings.solves_head)
    for fold in checkpoint.folds:
        model.add_to_base(unflatten_deltas(fold))
    adapter = settings.adapter  # a strategy's state may be of a lower rank
    current = checkpoint.state.ending
    layers = {name: at_rank(f, adapter.rank, adapter.transform) for name, f in current.layers.items()}
    model.write(AdapterState(layers, current.tensors))
    return model, load_tokenizer(named)


def require_target(target: Path) -> None:
    """Refuse to write over a file or a run.

    Raises:
        ConfigError: If the target is a file, or the folder of a run or of its adapter.
    """
    if target.exists() and not target.is_dir():
        raise ConfigError(f"TARGET {target}: it is a file; name a folder")
    if any((target / name).exists() for name in (ABOUT, "metrics.jsonl", "checkpoints")):
        raise ConfigError(f"TARGET {target}: it holds a run, which would be written over; name another folder")


def export_merged(folder: Path, target: Path, base: str = "", dtype: str = "") -> Path:
    """Write the fine-tuned model with everything merged into its weights, and its tokenizer.

    A model with pooling (`model.pooling`) carries its class as code and is opened with ``trust_remote_code=True``.

    Args:
        folder: See `load_run`.
        target: The folder to write; `AutoModel…from_pretrained` opens it without PEFT and without this package.
        base: See `load_run`.
        dtype: Of the tensors written, such as ``bfloat16``; as they were trained by default.

    Returns:
        The target.
    """
    require_target(target)
    model, tokenizer = _merged(folder, base, dtype)
    if isinstance(model, PooledClassification):
        save_pooled(model, tokenizer, target)
    else:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    return target


def export_sentence_transformers(folder: Path, target: Path, base: str = "", dtype: str = "") -> Path:
    """Write the fine-tuned model for sentence-transformers: ``SentenceTransformer(target).encode(texts)`` are logits.

    Args:
        folder: See `load_run`.
        target: The folder to write.
        base: See `load_run`.
        dtype: See `export_merged`; of the body, as the head's one layer stays in float32.

    Raises:
        ConfigError: If the model's head reads something else than pooled token states.
    """
    require_target(target)
    model, tokenizer = _merged(folder, base, dtype)
    names = _label_names(model.config)
    if not isinstance(model, PooledClassification):
        raise ConfigError(
            f"run.output-dir = '{folder}': {type(model).__name__} has a head of its own, which sentence-transformers "
            "does not know; export the merged model, or train with model.pooling = mean"
        )
    result = read_result(folder)
    length = (result.settings if result else parse(read_config(folder))).model.max_length
    save_sentence_transformers(model, tokenizer, target, names, length)
    return target


def export_gguf(folder: Path, target: Path, base: str = "", dtype: str = "") -> Path:
    """Write the fine-tuned language model with its tokenizer as one GGUF file, for llama.cpp and Ollama.

    Args:
        folder: See `load_run`.
        target: The file, if it ends in ``.gguf``, or the folder to write ``model.gguf`` to.
        base: See `load_run`.
        dtype: Of the matrices, as they were trained by default. Vectors are float32.

    Returns:
        The file.

    Raises:
        ConfigError: If the extra ``llm`` is missing, or the model or its tokenizer is none that is converted here.
    """
    from bora_fl.exporting.gguf_file import write_gguf

    extras.require("llm", "--as gguf", "gguf")
    if target.suffix != ".gguf":
        require_target(target)
    model, tokenizer = _merged(folder, base, "")  # each tensor is cast as it is written
    file = target if target.suffix == ".gguf" else target / "model.gguf"
    write_gguf(model, tokenizer, file, folder.resolve().name, dtype)
    return file


def _merged(folder: Path, base: str, dtype: str) -> tuple[Any, Any]:
    run, tokenizer = load_run(folder, base)
    model: Any = run.model if run.adapter.method == "full" else run.model.merge_and_unload()
    if run.task == "causal-lm":  # other programs end a turn by this alone
        model.generation_config.eos_token_id = stop_ids(model, tokenizer) or None
    return model.to(getattr(torch, dtype)) if dtype else model, tokenizer


def export_lora(folder: Path, target: Path, base: str = "", rank: int | None = None, dtype: str = "") -> float:
    """Write a BoRA run's adapter as a LoRA adapter of rank b·r, exactly, or as the closest one of a lower rank.

    Args:
        folder: See `load_run`.
        target: The folder to write, with the tokenizer and the label names beside the adapter.
        base: See `load_run`.
        rank: Of the LoRA adapter; b·r by default.
        dtype: Of the factors; see `export_merged`.

    Returns:
        The relative error of the update, `‖M − M_rank‖ / ‖M‖` over all layers.

    Raises:
        ConfigError: If the run's adapter is not BoRA, or part of the result is in the frozen weights.
    """
    from bora_fl.adapters import lora_error, save_as_lora

    if rank is not None and rank < 1:
        raise ConfigError(f"--rank {rank}: a LoRA adapter has rank 1 or more")
    require_target(target)
    model, tokenizer = load_run(folder, base, folded=False)
    if model.adapter.method != "bora":
        raise ConfigError(f"adapter.method = '{model.adapter.method}': only BoRA adapters are converted; PEFT opens it")
    save_as_lora(model.model, target, rank=rank, dtype=getattr(torch, dtype) if dtype else None)
    tokenizer.save_pretrained(target)
    if model.has_head:
        write_labels(target, _label_names(model.model.config))
    return 0.0 if rank is None else lora_error(model.model, rank)


def _label_names(config: Any) -> list[str]:
    return [config.id2label[index] for index in range(config.num_labels)]
