"""``bora-fl plan``: what a client's step takes, and the settings that fit a GPU."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from bora_fl.config import Settings
    from bora_fl.planning.memory import Estimate

console = Console()


def plan(
    recipe: Annotated[Path | None, typer.Argument(help="a recipe of recipes/; its settings, under those given")] = None,
    model: Annotated[str, typer.Option(help="the same as -c model.name=...; its config is read, not its weights")] = "",
    gpu: Annotated[str, typer.Option(help="memory of a client's GPU, such as 24GB: recommend what fits it")] = "",
    measure: Annotated[bool, typer.Option("--measure", help="take real steps here, for their time and memory")] = False,
    run_config: Annotated[
        list[str] | None,
        typer.Option(
            "--run-config", "-c", help="key=value, may be given several times; `bora-fl config` lists the keys"
        ),
    ] = None,
) -> None:
    """Say what a language model's run takes, and which settings fit a GPU.

    Memory of a client's step by part and bytes a round, before anything is loaded; with --gpu also the batch size,
    checkpointing and quantization that fit it, and why.
    """
    from bora_fl.config import ConfigError, Settings, overrides, parse
    from bora_fl.planning.advice import advise
    from bora_fl.planning.memory import estimate
    from bora_fl.planning.recipes import gigabytes, read_recipe

    found = read_recipe(recipe) if recipe else None
    base = found.settings.flat() if found else Settings().flat() | {"model.task": "causal-lm"}
    chosen = {**base, **overrides(run_config, base), **({"model.name": model} if model else {})}
    settings = parse(chosen)
    if settings.model.task != "causal-lm":
        raise ConfigError(f"model.task = {settings.model.task!r}: plan is for language models; set it to causal-lm")
    config = found.config if found and not model else _config(settings)
    if gpu or (found and not run_config):
        memory = gigabytes(gpu or (found.gpu if found else ""))
        advice = advise(settings, config, memory)
        keys = " ".join(f"-c {key}={str(value).lower()}" for key, value in advice.run_config.items())
        _show(settings, advice.estimate)
        console.print(f"recommended for {memory / 1e9:.0f} GB: {keys}", highlight=False, soft_wrap=True)
        for reason in advice.reasons:
            console.print(f"  {reason}", highlight=False, soft_wrap=True)
    else:
        _show(settings, estimate(settings, config))
    if measure:
        from bora_fl.planning.measuring import measure_step

        found_here, steps = measure_step(settings), settings.train.local_steps
        kept = "" if found_here.kept == found_here.held else f", {found_here.kept / 1e9:.3f} GB with what malloc keeps"
        console.print(
            f"measured here: {found_here.seconds:.2f} s a step, {found_here.seconds * steps:.0f} s for {steps} steps "
            f"of a round; at its peak {found_here.held / 1e9:.3f} GB of tensors{kept}, beside the process's libraries",
            highlight=False,
            soft_wrap=True,
        )


def rows(found: "Estimate") -> dict[str, float]:
    """The table of an estimate: counts, then bytes by part."""
    return {
        "parameters": found.parameters,
        "trained": found.trained,
        "base": found.base,
        "adapter": found.adapter,
        "optimizer": found.optimizer,
        "activations": found.fixed + found.batch * found.sequence,
        "logits": found.batch * found.logits,
        "step": found.total,
        "travels": found.travels,
    }


def _config(settings: "Settings") -> Any:
    from transformers import AutoConfig

    from bora_fl.config import ConfigError
    from bora_fl.models import resolve
    from bora_fl.models.base import require_language_model

    try:
        require_language_model(settings.model)
        return AutoConfig.from_pretrained(resolve(settings.model.name), revision=settings.model.revision or None)
    except OSError as error:
        raise ConfigError(
            f"model.name = {settings.model.name!r}: its config cannot be read ({' '.join(str(error).split())[:200]}); "
            "give a hub id, a local folder, or a recipe"
        ) from error


def _show(settings: "Settings", found: "Estimate") -> None:
    train, adapter = settings.train, settings.adapter
    title = f"{settings.model.name}: {found.batch} x {settings.model.max_length} tokens in memory"
    table = Table("what", "how much", title=title)
    words = {
        "parameters": "parameters of the base model",
        "trained": f"trained ({adapter.method}, b = {adapter.num_blocks}, r = {adapter.rank})",
        "base": f"base ({settings.model.dtype}, quantization {settings.model.quantization})",
        "optimizer": f"gradients and {train.optimizer}",
        "activations": f"activations{', with checkpointing' if train.checkpointing else ''}",
        "logits": "logits and the loss on them",
        "step": "a training step in all",
        "travels": "a client sends, and receives, a round (float32)",
    }
    for name, value in rows(found).items():
        shown = f"{value / 1e6:,.2f} M" if name in ("parameters", "trained") else f"{value / 1e9:,.3f} GB"
        table.add_row(words.get(name, name), shown)
    console.print(table)
