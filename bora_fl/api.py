"""The five functions of ``from bora_fl import ...``: simulate, compare, load, predict, export."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from bora_fl.config import ConfigError, Scalar, parse
from bora_fl.models.result import load as load
from bora_fl.quiet import quiet

__all__ = ["compare", "export", "load", "predict", "simulate"]

quiet()


def simulate(run_config: Mapping[str, Scalar], clients: int = 4) -> Path:
    """Run a federation of simulated clients in this process; ``bora-fl run --simulate`` spreads them over processes.

    Args:
        run_config: Settings by ``group.key`` that are not at their defaults; ``bora-fl config`` lists them.
        clients: Number of clients, at least 1.

    Returns:
        The run's output folder, ``run.output-dir``.

    Raises:
        ConfigError: For a setting that cannot be used.
        RunFailedError: If the run cannot go on.
    """
    from bora_fl.simulations.engine import simulate

    if clients < 1:
        raise ConfigError(f"clients = {clients}: a federation has at least 1")
    return simulate(dict(run_config), clients)


def compare(
    strategies: Sequence[str],
    run_config: Mapping[str, Scalar] | None = None,
    *,
    scenarios: Sequence[str] = ("natural",),
    methods: Sequence[str] = ("bora",),
    seeds: int = 3,
    clients: int = 8,
    baseline: str = "",
    output: str | Path = "runs/compare",
    workers: int = 0,
) -> Any:
    """Compare strategies, your own among them, over scenarios and seeds, as ``bora-fl compare`` does.

    Args:
        strategies: As for ``strategy.name``.
        run_config: Settings of all runs that are not at the comparison's defaults.
        scenarios: Names that ``bora-fl compare --list`` shows, or ``dirichlet-<alpha>``.
        methods: As for ``adapter.method``.
        seeds: Number of seeds, from 0.
        clients: Number of clients where the scenario has no number of its own.
        baseline: The strategy that differences are from; the first by default.
        output: Folder of the runs, ``results.csv`` and ``report.html``; what is finished there is not run again.
        workers: Runs at once; 0 is the number of cores.

    Returns:
        `simulations.compare.results.Results`: ``summaries``, a row per scenario and variant, with means and 95 %
        intervals over the seeds, and ``failures``.

    Raises:
        ConfigError: For a name or a setting that cannot be used.
    """
    from bora_fl.simulations.compare.command import BASE
    from bora_fl.simulations.compare.plan import plan
    from bora_fl.simulations.compare.run import Comparison, baseline_of

    chosen = dict(run_config or {})
    parse(chosen)
    root = Path(output).expanduser().resolve()
    laid_out = plan(
        BASE,
        strategies=strategies,
        scenarios=scenarios,
        methods=methods,
        seeds=range(seeds),
        clients=clients,
        root=root,
        threads=1,
        chosen=chosen,
    )
    against = baseline_of(baseline, laid_out.variants)
    return Comparison(laid_out, against, workers=workers).run().results


def predict(
    folder: str | Path, texts: Sequence[str], *, base: str = "", max_new_tokens: int = 64
) -> list[dict[str, Any]]:
    """Predict with a finished run.

    Args:
        folder: The run's output folder, or its adapter's.
        texts: The texts, or prompts.
        base: See `load`.
        max_new_tokens: Tokens to write at most, for a language model.

    Returns:
        For each text, ``text`` and ``label`` with its ``probability``, or ``response`` of a language model.

    Raises:
        ConfigError: As `load` does.
    """
    from bora_fl.models import read_result
    from bora_fl.predicting.prediction import rows

    model, tokenizer = load(folder, base)
    result = read_result(Path(folder).expanduser())
    assert result is not None  # else `load` has raised
    return list(rows(model, tokenizer, list(texts), result.settings, max_new_tokens))


def export(
    folder: str | Path,
    target: str | Path,
    form: Literal["merged", "lora", "gguf", "sentence-transformers"] = "merged",
    *,
    rank: int | None = None,
    dtype: Literal["", "float32", "float16", "bfloat16"] = "",
    base: str = "",
) -> Path:
    """Write a finished run for other programs.

    Args:
        folder: The run's output folder, or its adapter's.
        target: The folder to write; with ``gguf`` a file, if it ends in ``.gguf``.
        form: ``merged``, a plain transformers model; ``lora``, a LoRA adapter of rank b·r; ``gguf``, a file for
            llama.cpp; ``sentence-transformers``.
        rank: Of the LoRA adapter: the closest one of a lower rank.
        dtype: Of the tensors written; as they were trained by default.
        base: See `load`.

    Returns:
        What was written.

    Raises:
        ConfigError: If the run has no such form.
    """
    from bora_fl.exporting import forms

    source, into = Path(folder).expanduser(), Path(target).expanduser()
    if form == "lora":
        forms.export_lora(source, into, base, rank, dtype)
    elif rank is not None:
        raise ConfigError(f"rank = {rank} with form = {form!r}: only a LoRA adapter has a rank; use form='lora'")
    elif form == "merged":
        forms.export_merged(source, into, base, dtype)
    elif form == "gguf":
        return forms.export_gguf(source, into, base, dtype)
    elif form == "sentence-transformers":
        forms.export_sentence_transformers(source, into, base, dtype)
    else:
        raise ConfigError(f"form = {form!r}: use one of merged, lora, gguf, sentence-transformers")
    return into
