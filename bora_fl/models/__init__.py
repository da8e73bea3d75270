"""Base models and adapters: load any Hugging Face model, adapt it by the settings, read and write what is trained."""

from bora_fl.models.base import EMBEDDED, load_base, load_tokenizer, resolve
from bora_fl.models.federated import FederatedModel, peft_config

__all__ = ["EMBEDDED", "FederatedModel", "load_base", "load_tokenizer", "peft_config", "resolve"]
