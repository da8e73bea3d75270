"""``bora-fl compare``: strategies × scenarios × seeds, on the in-process engine."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from bora_fl.config import FEDERATION_FILE, ConfigError, Federation, Scalar, extras, overrides, read_federation
from bora_fl.simulations.compare.scenarios import SCENARIOS
from bora_fl.simulations.compare.suites import SUITES
from bora_fl.simulations.compare.suites import suite as named_suite

if TYPE_CHECKING:
    from bora_fl.simulations.compare.results import Results

# Clients are evaluated after the merge, not before they train: the last round counts too.
BASE: dict[str, Scalar] = {
    "strategy.fraction-evaluate": 1.0,
    "strategy.evaluate-in-train": False,
    "train.local-steps": 15,
    "run.num-rounds": 8,
    "data.max-test-examples": 2000,
}
# Made to fit 72 runs of eight strategies into twenty minutes on two cores and yet to learn something in 28 steps, with
# clients that drift apart: short texts, few clients, high and constant learning rates.
QUICK: dict[str, Scalar] = BASE | {
    "model.max-length": 24,
    "train.local-steps": 2,
    "train.learning-rate": 4e-3,
    "train.head-learning-rate": 2e-2,
    "train.schedule": "constant",
    "run.num-rounds": 14,
    "run.evaluate-every": 7,
    "data.max-train-examples": 3000,
    "data.max-test-examples": 500,
    "data.evaluation-fraction": 0.05,
}
# DP-SGD averages its noise over a batch: few steps on many examples. Nearly all of a noised gradient is noise, whose
# sign Adam turns into whole steps, so that learning rates are higher than without.
PRIVATE: dict[str, Scalar] = {
    "model.max-length": 24,
    "adapter.rank": 4,
    "adapter.num-blocks": 4,
    "adapter.alpha": 8.0,
    "train.batch-size": 64,
    "train.accumulation": 4,
    "train.local-steps": 4,
    "train.learning-rate": 2e-2,
    "train.head-learning-rate": 6e-2,
    "train.schedule": "constant",
    "train.max-grad-norm": 0.0,
    "privacy.physical-batch-size": 64,
    "run.num-rounds": 5,
    "run.evaluate-every": 5,
    "data.evaluation-fraction": 0.02,
}
PRIVATE_STRATEGIES = "fedavg,ffa,fedsvd,cyclic,refactor"
QUICK_STRATEGIES = "fedavg,ffa,flora,flexlora,fedex,rolora,cyclic,refactor"
QUICK_SCENARIOS = "dirichlet-0.1,dirichlet-1,dirichlet-100"
QUICK_CLIENTS, CLIENTS = 3, 8
OF_THE_FOLDER = ("model.", "adapter.", "data.", "train.", "run.num-rounds")
"""What a comparison takes of a folder's federation.toml; strategies and partitions are its own."""

console = Console()


def compare(
    output: Annotated[Path, typer.Option(help="folder of the runs and the report; run again to go on")] = Path(
        "runs/compare"
    ),
    suite: Annotated[str, typer.Option(help=f"a comparison by name: {', '.join(SUITES)}; options still win")] = "",
    strategies: Annotated[
        str,
        typer.Option(help="comma-separated, or all; `bora-fl strategies` lists them; method/strategy is one variant"),
    ] = "",
    scenarios: Annotated[str, typer.Option(help="comma-separated, or all; --list shows them")] = "",
    methods: Annotated[
        str,
        typer.Option(
            help="comma-separated: bora, ravan, dense-core, lora, dora, gralora, vera, full or another of PEFT; if not "
            "given, federation.toml's, else bora"
        ),
    ] = "",
    seeds: Annotated[int, typer.Option(help="number of seeds; 0 is the suite's, else 3")] = 0,
    first_seed: Annotated[int, typer.Option(help="the first of them; choose on others than are reported")] = 0,
    clients: Annotated[
        int,
        typer.Option(
            help="clients where the scenario has no number of its own; 0 is federation.toml's, else 8, quick 3"
        ),
    ] = 0,
    baseline: Annotated[
        str, typer.Option(help="strategy, or method/strategy, that differences are from; the first if not given")
    ] = "",
    tune: Annotated[
        bool, typer.Option("--tune", help="search each variant's learning rate, on seeds of its own")
    ] = False,
    rates: Annotated[
        str, typer.Option(help="multiples of its learning rate that --tune tries; 1: none is searched")
    ] = "0.3,1,3",
    tune_seeds: Annotated[
        int, typer.Option(help="number of seeds for --tune, from 1000; 0 is the suite's, else 2")
    ] = 0,
    baselines: Annotated[
        str, typer.Option(help="also local, central, iid (retention), comma-separated; all; none, if no suite has any")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would run and how long it takes, and stop")
    ] = False,
    privacy: Annotated[
        str, typer.Option(help="epsilons per record, and none: DP-SGD at each of them, such as none,6,3")
    ] = "",
    target: Annotated[float, typer.Option(help="accuracy for bytes to target; 0 is the baseline's own")] = 0.0,
    workers: Annotated[int, typer.Option(help="runs at once; 0 is cores divided by --threads")] = 0,
    threads: Annotated[int, typer.Option(help="torch threads per run")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="a reduced comparison, twenty minutes on two cores")] = False,
    list_scenarios: Annotated[bool, typer.Option("--list", help="list the scenarios and stop")] = False,
    run_config: Annotated[
        list[str] | None,
        typer.Option("--run-config", "-c", help="key=value for all runs, may be given several times"),
    ] = None,
) -> None:
    """Compare strategies, and adapter methods, across non-IID scenarios and seeds.

    Writes results.csv, results.json, table.md, report.html and PNGs. A run that is finished is not run again; a crash
    loses one run and stands in the report with its reason. In a folder with a federation.toml, its model, adapter, data
    and training are compared, unless --suite, --quick or --privacy says what to compare.
    """
    if list_scenarios:
        _show_scenarios()
        return
    extras.require("report", "compare")
    # The rest needs torch, which the command's help does not.
    from bora_fl.simulations.compare import tuning
    from bora_fl.simulations.compare.plan import AXES, plan
    from bora_fl.simulations.compare.run import Comparison, baseline_of
    from bora_fl.simulations.compare.timing import in_words

    base, named = {**(QUICK if quick else BASE)}, named_suite(suite) if suite else None
    if named:
        strategies, scenarios = strategies or named.strategies, scenarios or named.scenarios
        seeds, tune, baselines = seeds or named.seeds, tune or named.tune, baselines or ",".join(named.baselines)
        base = {**base, **named.config}
    federation = Federation() if named or quick or privacy else read_federation(Path.cwd())
    if federation.run_config:
        console.print(f"model, adapter, data and training are those of {FEDERATION_FILE}", highlight=False)
    own = {key: value for key, value in federation.run_config.items() if key.startswith(OF_THE_FOLDER)}
    method = str(own.get("adapter.method", "bora"))
    own = {key: value for key, value in own.items() if key not in AXES}
    base |= own
    chosen = overrides(run_config, base)
    factors = tuning.factors_of(rates)
    if not tune and (tune_seeds or factors not in ([1], tuning.factors_of(tuning.RATES))):
        given = f"--tune-seeds {tune_seeds}" if tune_seeds else f"--rates {rates}"
        raise ConfigError(f"{given}: it says how --tune searches; give --tune too, or leave it out")
    if not 0 <= target <= 1:
        raise ConfigError(f"--target {target:g}: an accuracy is between 0 and 1; 0 takes the baseline's own")
    if workers < 0:
        raise ConfigError(f"--workers {workers}: give at least 1, or 0 for cores divided by --threads")
    all_strategies = QUICK_STRATEGIES if quick else PRIVATE_STRATEGIES if privacy else "all"
    all_scenarios = QUICK_SCENARIOS if quick else "natural" if privacy else "all"
    laid_out = plan(
        base | (PRIVATE if privacy else {}),
        strategies=_names("--strategies", strategies or all_strategies),
        scenarios=_scenario_names(scenarios or all_scenarios),
        methods=_names("--methods", methods or method),
        seeds=range(first_seed, first_seed + (seeds or 3)),
        clients=clients
        or (named.clients if named else 0)
        or federation.simulate
        or (QUICK_CLIENTS if quick else CLIENTS),
        root=output.expanduser().resolve(),
        threads=threads,
        privacy=_names("--privacy", privacy) if privacy else (),
        chosen=chosen,
        by_method=named.methods if named else {method: own},
    )
    against = baseline_of(baseline, laid_out.variants)
    for reason in laid_out.reasons():
        console.print(f"skipped: {reason}", highlight=False, markup=False)
    comparison = Comparison(
        laid_out,
        against,
        factors if tune and factors != [1] else (),
        tune_seeds or (named.tune_seeds if named else 2),
        _baselines(baselines),
        workers,
        threads,
        console,
    )
    console.print(comparison.describe(), highlight=False, soft_wrap=True)
    if dry_run:  # not before a run: without a finished one it trains a round, which may take minutes
        comparison.fetch()
        comparison.check()
        left = in_words(comparison.seconds_left())
        console.print(f"about {left} left on this machine as busy as it is now", highlight=False)
        return
    done = comparison.run(target)
    _show(done.results)
    for path in done.paths:
        console.print(f"  {path}", highlight=False, soft_wrap=True)
    if done.failed:
        console.print(f"[bold red]{done.failed} of {done.runs} runs failed[/]; see report.html and run.log")
        sys.exit(1)


def _names(option: str, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"{option} {text!r}: name at least one")
    return names


def _baselines(text: str) -> tuple[str, ...]:
    from bora_fl.simulations.compare.references import BASELINES

    if text in ("", "none", "all"):
        return BASELINES if text == "all" else ()
    names = tuple(_names("--baselines", text))
    if unknown := set(names) - set(BASELINES):
        raise ConfigError(
            f"--baselines {text!r}: {', '.join(sorted(unknown))} is none of {', '.join(BASELINES)}; name some of them, "
            "all or none"
        )
    return names


def _scenario_names(text: str) -> list[str]:
    names = _names("--scenarios", text)
    return list(SCENARIOS) if names == ["all"] else names


def _show_scenarios() -> None:
    table = Table("name", "what it is", "clients", title="scenarios")
    for row in SCENARIOS.values():
        table.add_row(row.name, row.summary, str(row.num_clients or "--clients"))
    table.add_row("dirichlet-<alpha>", "label skew for any alpha", "--clients")
    table.add_row("natural-<clients>", "so many silos by domain", "<clients>")
    console.print(table)


def _show(found: "Results") -> None:
    from bora_fl.simulations.compare.figures import interval
    from bora_fl.simulations.compare.report import against_what

    for scenario in found.plan.scenarios:
        if not (summaries := found.of(scenario.name)):
            continue
        names = ("strategy", "accuracy %", "difference", "over round 0", "retention %", "rate", "loss", "MB", "epsilon")
        rows = [
            (
                found.plan.label(s.variant),
                interval(s.accuracy, 100),
                interval(s.difference, 100, sign=True),
                interval(s.gain, 100, sign=True),
                interval(s.retention, 100),
                f"{s.learning_rate:g}",
                interval(s.loss, digits=3),
                interval(s.megabytes, digits=2),
                "-" if s.epsilon is None else f"{s.epsilon:.2f} per {s.epsilon_unit}",
            )
            for s in summaries
        ]
        measured = [place for place in range(len(names)) if any(row[place] != "-" for row in rows)]
        table = Table(title=f"{scenario.name}: {scenario.summary}", box=box.SIMPLE)
        for place in measured:
            table.add_column(names[place], overflow="fold", justify="right" if place else "left")
        for row in rows:
            table.add_row(*(row[place] for place in measured))
        # What is no terminal has lines as long as they need to be.
        console.print(table, width=None if console.is_terminal else 200, crop=False)
        console.print(f"  {against_what(found, scenario.name)}", highlight=False, soft_wrap=True)
