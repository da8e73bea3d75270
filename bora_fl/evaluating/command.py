"""``bora-fl evaluate``: a finished run on the tasks of lm-evaluation-harness."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

console = Console()
EVALUATIONS = "evaluations.jsonl"


def evaluate(
    run: Annotated[Path, typer.Argument(help="output folder of a run, or its adapter's")],
    tasks: Annotated[str, typer.Option(help="comma-separated tasks or groups of lm-evaluation-harness")],
    rounds: Annotated[
        str,
        typer.Option(help="comma-separated: base (before the run), last, or rounds that have a checkpoint; or all"),
    ] = "last",
    task_folder: Annotated[Path | None, typer.Option(help="folder of YAML files of your own tasks")] = None,
    limit: Annotated[int, typer.Option(help="examples of each task at most; 0 is all", min=0)] = 0,
    few_shot: Annotated[int, typer.Option(help="solved examples before each; -1: what the task says", min=-1)] = -1,
    batch_size: Annotated[int, typer.Option(help="sequences per forward pass", min=1)] = 8,
    chat_template: Annotated[bool, typer.Option(help="write prompts by the model's chat template")] = False,
    base: Annotated[
        str, typer.Option(help="where the base model is here: hub id or folder, if not where the run had it")
    ] = "",
) -> None:
    """Evaluate a finished run's language model on tasks of lm-evaluation-harness.

    Prints a table, and appends a line for each round to evaluations.jsonl in the run's folder.
    """
    from bora_fl.config import ConfigError
    from bora_fl.evaluating.harness import Options, require_tasks, run_tasks
    from bora_fl.predicting.opening import open_base, open_run, require_result, rounds_of
    from bora_fl.report import append_row

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    options = Options(names, task_folder, limit, few_shot, batch_size, chat_template)
    manager = require_tasks(options)
    result = require_result(run)
    if result.settings.model.task != "causal-lm":
        raise ConfigError(f"RUN {run}: it holds a classifier; the harness evaluates language models")
    kept = rounds_of(run)
    asked = ["base", *map(str, kept), "last"] if rounds == "all" else [name.strip() for name in rounds.split(",")]
    wrong = [name for name in asked if name not in ("base", "last") and not (name.isdigit() and int(name) in kept)]
    if wrong:
        raise ConfigError(
            f"--rounds {','.join(wrong)}: {run} has checkpoints of the rounds {', '.join(map(str, kept)) or 'none'} "
            "(run.keep-checkpoints says how many are kept); name some, base, last or all"
        )
    found = {}
    for name in asked:
        if name == "base":
            model, tokenizer = open_base(run, base)
        else:
            model, tokenizer = open_run(run, base, int(name) if name.isdigit() else None)
        found[name] = run_tasks(model, tokenizer, options, manager)
        row = {"round": result.round if name == "last" else 0 if name == "base" else int(name), "model": name}
        where = run if (run / "adapter").is_dir() else run.parent
        append_row(where / EVALUATIONS, row | {"tasks": found[name], "limit": limit, "few_shot": few_shot})
    table = Table("task", "metric", *asked, title=str(run))
    for task, metrics in found[asked[0]].items():
        for metric in metrics:
            values = [f"{found[name][task].get(metric, float('nan')):.4f}" for name in asked]
            table.add_row(task, metric, *values)
    console.print(table)
