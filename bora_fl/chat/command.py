"""``bora-fl chat``: a conversation in a terminal, or a line in and a line out of a pipe."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()


def chat(
    run: Annotated[Path, typer.Argument(help="output folder of a run, or its adapter's")],
    system: Annotated[str, typer.Option(help="system prompt")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="tokens to write at most", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="of what is drawn; 0 takes the most likely token", min=0)] = 0.0,
    round: Annotated[int, typer.Option(help="as it was after this round; -1 is the end", min=-1)] = -1,
    base: Annotated[
        str, typer.Option(help="where the base model is here: hub id or folder, if not where the run had it")
    ] = "",
) -> None:
    """Talk to the language model of a finished run.

    An empty line begins a new conversation, Ctrl-D ends. From a pipe, each line is answered by a line of JSON text.
    What no longer fits into the model's context is forgotten, the oldest question and its answer first.
    """
    import json

    from bora_fl.config import ConfigError
    from bora_fl.data.prompts import conversation_ids, prompt_ids
    from bora_fl.models.generating import complete, context_length
    from bora_fl.predicting.opening import open_run, require_result

    result = require_result(run)
    if result.settings.model.task != "causal-lm":
        raise ConfigError(f"RUN {run}: it holds a classifier, which does not write; use `bora-fl predict`")
    model, tokenizer = open_run(run, base, None if round < 0 else round)
    dialog = result.settings.data.dialog
    remembers = dialog and bool(getattr(tokenizer, "chat_template", None))
    if system and not remembers:
        raise ConfigError(f"--system {system!r}: this model has no chat template to write it by; leave it out")
    context = context_length(model)
    opening = [{"role": "system", "content": system}] if system else []
    turns = list(opening)
    for said in _lines():
        if not said.strip():
            turns = list(opening)
            continue
        turns.append({"role": "user", "content": said})
        ids = conversation_ids(tokenizer, turns) if remembers else prompt_ids(tokenizer, [said], dialog)[0]
        while remembers and context and len(ids) + max_new_tokens > context and len(turns) > len(opening) + 1:
            del turns[len(opening) : len(opening) + 2]  # the oldest question and its answer
            ids = conversation_ids(tokenizer, turns)
        answer = next(complete(model, tokenizer, [ids], max_new_tokens=max_new_tokens, temperature=temperature))
        turns.append({"role": "assistant", "content": answer})
        if sys.stdin.isatty():
            console.print(answer, markup=False, highlight=False, style="green")
        else:
            print(json.dumps(answer, ensure_ascii=False), flush=True)


def _lines() -> Iterator[str]:
    from bora_fl.predicting.texts import utf8_lines

    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in utf8_lines(sys.stdin, "standard input"))
        return
    while True:
        try:
            yield console.input("[bold]> [/]")
        except (EOFError, KeyboardInterrupt):
            return
