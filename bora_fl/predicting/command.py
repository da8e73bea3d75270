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
    round: Annotated[int, typer.Option(help="as it was after this round; -1 is the end", min=-1)] = -1,
    base: Annotated[
        str, typer.Option(help="where the base model is here: hub id or folder, if not where the run had it")
    ] = "",
) -> None:
    """Predict with a finished run: each text's label or labels, a number, its words' labels, or a response."""
    from bora_fl.config import ConfigError
    from bora_fl.predicting.opening import open_run, require_result
    from bora_fl.predicting.prediction import rows
    from bora_fl.predicting.texts import read_texts

    result = require_result(run)
    if output and (output.is_dir() or not output.parent.is_dir()):
        raise ConfigError(f"--output {output}: name a file in a folder that exists")
    given = Path(file).expanduser()
    if output and output.exists() and given.exists() and output.samefile(given):
        raise ConfigError(f"--output {output}: it is the file of the texts, which would be written over; name another")
    data = result.settings.data
    dialogs = data.format in ("messages", "preference")
    column = text_column or data.text_column or "prompt"
    texts = read_texts(file, column, dialogs=dialogs, context=data.context_column, words=data.format == "words")
    model, tokenizer = open_run(run, base, None if round < 0 else round)
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(output.open("w", encoding="utf8")) if output else sys.stdout
        for row in rows(model, tokenizer, texts, result.settings, max_new_tokens):
            print(json.dumps(row, ensure_ascii=False), file=out, flush=True)
