"""Write a classifier with pooling so that it opens and predicts the same without this package.

transformers has no class for it: `save_pooled` puts the class beside the weights, for ``trust_remote_code=True``, under
a model type of its own, so that whoever opens it without that is told instead of getting a model with another head.
`save_sentence_transformers` needs no code: a sentence encoder whose last module is the head, so that
``SentenceTransformer(folder).encode(texts)`` gives the logits.
"""

import inspect
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from bora_fl.models import pooling
from bora_fl.models.pooling import PooledClassification

_CODE = """

# The class of this model.
from transformers import {config}, {base}  # noqa: E402


class Pooled{config}({config}):
    model_type = "pooled_{model_type}"


class Pooled{base}(PooledClassification, {base}):
    pooling = "{pooling}"
    config_class = Pooled{config}
"""
_MODES = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}


def save_pooled(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model with pooling, its tokenizer and its class.

    ``AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)`` and
    ``pipeline("text-classification", folder, trust_remote_code=True)`` open it.

    Args:
        model: A model of a `bora_fl.models.pooling.pooled_class`, with nothing of PEFT in it.
        tokenizer: Its tokenizer.
        folder: Made if it is missing.
    """
    base, config = type(model).__mro__[2], type(model.config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    names = {
        "base": base.__name__,
        "config": config.__name__,
        "model_type": model.config.model_type,
        "pooling": model.pooling,
    }
    (folder / "modeling_pooled.py").write_text(inspect.getsource(pooling) + _CODE.format(**names))
    classes = {"AutoConfig": f"Pooled{names['config']}", "AutoModelForSequenceClassification": f"Pooled{names['base']}"}
    stored = json.loads((folder / "config.json").read_text())
    stored |= {
        "architectures": [classes["AutoModelForSequenceClassification"]],
        "model_type": f"pooled_{names['model_type']}",
        "auto_map": {auto: f"modeling_pooled.{name}" for auto, name in classes.items()},
    }
    (folder / "config.json").write_text(json.dumps(stored, indent=2))


def save_sentence_transformers(
    model: Any, tokenizer: Any, folder: Path, label_names: list[str], max_length: int
) -> None:
    """Write a model with pooling as a sentence-transformers folder: body, pooling, and the head as a dense layer.

    Args:
        model: A model of a `bora_fl.models.pooling.pooled_class`, with nothing of PEFT in it.
        tokenizer: Its tokenizer.
        folder: Made if it is missing.
        label_names: Names of the logits, written into ``label_names.json``.
        max_length: Tokens that a text is cut at, as in training.

    Raises:
        ValueError: If the model has no such pooling.
    """
    if not isinstance(model, PooledClassification) or model.pooling not in _MODES:
        raise ValueError(
            f"{type(model).__name__} has no pooling that sentence-transformers knows; train with model.pooling = mean"
        )
    body: Any = model.base_model  # type: ignore[attr-defined]
    head = getattr(model, model.head_name)
    body.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds.items())
    ]
    modes = {f"pooling_mode_{name}": False for name in (*_MODES.values(), "max_tokens", "mean_sqrt_len_tokens")}
    modes[f"pooling_mode_{_MODES[model.pooling]}"] = True
    dense = {
        "in_features": head.in_features,
        "out_features": head.out_features,
        "bias": head.bias is not None,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    files: dict[str, Any] = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": head.in_features, **modes},
        "2_Dense/config.json": dense,
        "label_names.json": label_names,
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2))
    tensors = {f"linear.{name}": p.detach().float().contiguous() for name, p in head.named_parameters()}
    save_file(tensors, folder / "2_Dense" / "model.safetensors")
