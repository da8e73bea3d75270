"""``bora-fl export``: write a finished run for other programs."""

import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()
FORMS = ("merged", "lora", "gguf", "sentence-transformers")
DTYPES = ("float32", "float16", "bfloat16")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Those that its ``--max-lora-rank`` takes; memory is set aside by it, whatever rank an adapter has."""


def export(
    folder: Annotated[Path, typer.Argument(help="output folder of a run, or its adapter's")],
    target: Annotated[Path, typer.Argument(help="folder to write; of --as gguf a file, if it ends in .gguf")],
    form: Annotated[
        str,
        typer.Option(
            "--as",
            help="merged: a plain model; lora: of rank b·r; gguf: for llama.cpp; sentence-transformers",
        ),
    ] = "merged",
    rank: Annotated[
        int, typer.Option(help="rank of the LoRA adapter: the closest one of a lower rank, and how close it is")
    ] = 0,
    dtype: Annotated[
        str, typer.Option(help="of the tensors written: float32, float16, bfloat16; as trained if empty")
    ] = "",
    base: Annotated[
        str, typer.Option(help="where the base model is here: hub id or folder, if not where the run had it")
    ] = "",
) -> None:
    """Write a finished run as a merged model, as a GGUF file or as a LoRA adapter."""
    from bora_fl.config import ConfigError
    from bora_fl.exporting import forms

    if dtype and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: use one of {', '.join(DTYPES)}")
    if form not in FORMS:
        raise ConfigError(f"--as {form}: use one of {', '.join(FORMS)}")
    if rank and form != "lora":
        raise ConfigError(f"--rank {rank} with --as {form}: only a LoRA adapter has a rank; use --as lora")
    if form == "lora":
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            error = forms.export_lora(folder, target, base, rank or None, dtype)
        for warning in said:
            if issubclass(warning.category, UserWarning):
                _say(f"note: {warning.message}")
        if rank:
            _say(f"relative error of the update at rank {rank}: {error:.4g}")
        if rank and rank not in VLLM_RANKS:
            served = ", ".join(map(str, VLLM_RANKS))
            _say(f"note: vLLM's --max-lora-rank takes {served}; give it the next one above {rank}")
    elif form == "merged":
        forms.export_merged(folder, target, base, dtype)
    elif form == "gguf":
        target = forms.export_gguf(folder, target, base, dtype)
    else:
        forms.export_sentence_transformers(folder, target, base, dtype)
    _say(f"wrote {target}")


def _say(line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
