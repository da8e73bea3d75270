"""Base models and adapters: load any Hugging Face model, adapt it by the settings, read and write what is trained."""

from bora_fl.models.adapting import peft_config
from bora_fl.models.base import load_base, load_tokenizer, resolve, settled
from bora_fl.models.federated import FederatedModel
from bora_fl.models.result import Result, load_result, read_result, write_result

__all__ = [
    "FederatedModel",
    "Result",
    "load_base",
    "load_result",
    "load_tokenizer",
    "peft_config",
    "read_result",
    "resolve",
    "settled",
    "write_result",
]
