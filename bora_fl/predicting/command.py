"""``bora-fl predict``: a finished run's predictions as JSON lines."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def predict(
    run: Annotated[Path, typer.Argument(help="output folder of a run, or its adapter's")],
    file: Annotated[str, typer.Argument(help="texts: .jsonl, .csv, .tsv, .parquet, lines of another file, or -")],
    output: Annotated[Path | None, typer.Option(help="file to write; standard output by default")] = None,
    text_column: Annotated[str, typer.Option(help="column of the texts; the run's data.text-column by default")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="tokens to write at most (causal-lm)", min=1)] = 64,
    base: Annotated[
        str, typer.Option(help="where the base model is here: hub id or folder, if not where the run had it")
    ] = "",
) -> None:
    """Predict with a finished run: a label and its probability for each text, or a language model's response."""
    from bora_fl.config import ConfigError
    from bora_fl.models import read_result
    from bora_fl.models.result import load
    from bora_fl.predicting.prediction import rows
    from bora_fl.predicting.texts import read_texts

    result = read_result(run)
    if result is None:
        raise ConfigError(f"RUN {run}: it holds no finished adapter; name the output folder of a finished run")
    data = result.settings.data
    texts = read_texts(file, text_column or data.text_column, dialogs=data.format == "messages")
    model, tokenizer = load(run, base)
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(output.open("w", encoding="utf8")) if output else sys.stdout
        for row in rows(model, tokenizer, texts, result.settings, max_new_tokens):
            print(json.dumps(row, ensure_ascii=False), file=out, flush=True)
