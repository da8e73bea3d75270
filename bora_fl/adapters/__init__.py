"""BoRA adapters, and trained cores between frozen bases, as PEFT methods, registered by importing this package."""

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from .config import BoraConfig
from .convert import adapter_to_lora, lora_error, save_as_lora
from .hotswap import hotswap_adapter
from .layer import BoraAdapter, BoraLayer
from .model import BoraModel
from .peft_type import BORA, RAVAN
from .ravan import RavanConfig, RavanModel
from .state import named_layers, read_factors, write_factors

__all__ = [
    "BORA",
    "BoraAdapter",
    "BoraConfig",
    "BoraLayer",
    "BoraModel",
    "RavanConfig",
    "adapter_to_lora",
    "hotswap_adapter",
    "lora_error",
    "named_layers",
    "read_factors",
    "save_as_lora",
    "write_factors",
]

if BORA not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(name="bora", config_cls=BoraConfig, model_cls=BoraModel)
if RAVAN not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(name="ravan", config_cls=RavanConfig, model_cls=RavanModel)
