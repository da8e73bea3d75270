"""Base models and adapters: load any Hugging Face model, adapt it by the settings, read and write what is trained."""

from bora_fl.models.federated import (
    EMBEDDED,
    FederatedModel,
    load_base,
    load_tokenizer,
    loads,
    peft_config,
    resolve,
)

__all__ = ["EMBEDDED", "FederatedModel", "load_base", "load_tokenizer", "loads", "peft_config", "resolve"]
