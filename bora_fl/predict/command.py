"""``bora-fl predict``: a finished run's predictions as JSON lines."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

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
    from bora_fl.predict.texts import read_texts

    result = read_result(run)
    if result is None:
        raise ConfigError(f"RUN {run}: it holds no finished adapter; name the output folder of a finished run")
    texts = read_texts(file, text_column or result.settings.data.text_column)
    model, tokenizer = load(run, base)
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(output.open("w", encoding="utf8")) if output else sys.stdout
        for row in _rows(model, tokenizer, texts, result.settings, max_new_tokens):
            print(json.dumps(row, ensure_ascii=False), file=out, flush=True)


def _rows(model: Any, tokenizer: Any, texts: list[str], settings: Any, max_new_tokens: int) -> Iterator[dict[str, Any]]:
    from bora_fl.predict.prediction import classify, generate

    if settings.model.task == "classification":
        for text, (label, probability) in zip(
            texts, classify(model, tokenizer, texts, settings.model.max_length), strict=True
        ):
            yield {"text": text, "label": label, "probability": round(probability, 6)}
        return
    dialog = bool(settings.data.response_column)
    responses = generate(model, tokenizer, texts, dialog=dialog, max_new_tokens=max_new_tokens)
    for text, response in zip(texts, responses, strict=True):
        yield {"text": text, "response": response}
