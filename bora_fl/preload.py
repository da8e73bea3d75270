"""The large libraries, imported by one thread at a time.

Flower imports the ServerApp and the ClientApp of a simulation in two threads at once. Where both import PEFT and
transformers, Python breaks the deadlock of their import locks by handing one thread half a module. Both apps import
this module first, and its own import lock makes the second thread wait for the first.
"""

import importlib

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from bora_fl.config import extras

__all__ = [
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoTokenizer",
    "peft",
    "torch",
    "transformers",
]

if not extras.missing("privacy"):
    importlib.import_module("opacus")
