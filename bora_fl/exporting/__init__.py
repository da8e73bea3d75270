"""A finished run as other programs want it."""

from bora_fl.exporting.forms import export_gguf, export_lora, export_merged, export_sentence_transformers, load_run

__all__ = ["export_gguf", "export_lora", "export_merged", "export_sentence_transformers", "load_run"]
