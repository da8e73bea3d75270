"""``bora-fl audit``: a lower bound of ε from one training run."""

import math
from typing import Annotated

import typer
from rich.console import Console

from bora_fl.config import ConfigError, Scalar, Settings, extras, overrides, parse

# One client whose few records the canaries are half of, trained for long: what gives a lower bound its best chance.
BASE: dict[str, Scalar] = {
    "privacy.mode": "record",
    "strategy.weighting": "uniform",
    "model.max-length": 16,
    "data.partition": "iid",
    "data.max-train-examples": 256,
    "data.evaluation-fraction": 0.0,
    "train.batch-size": 64,
    "train.local-steps": 200,
    "train.learning-rate": 4e-3,
    "train.schedule": "constant",
    "run.num-rounds": 1,
    "run.threads": 1,
}
PER_CLIENT = ("client", "local")
console = Console()


def audit(
    canaries: Annotated[int, typer.Option(help="canaries drawn; about half of them are trained on")] = 512,
    noise: Annotated[
        bool, typer.Option(help="--no-noise trains without privacy, to see what an audit can find")
    ] = True,
    trials: Annotated[
        int, typer.Option("--time", help="instead: this often, the time of a round with a long record and without it")
    ] = 0,
    confidence: Annotated[float, typer.Option(help="probability with which the bound holds")] = 0.95,
    run_config: Annotated[
        list[str] | None,
        typer.Option(
            "--run-config", "-c", help="key=value, may be given several times; `bora-fl config` lists the keys"
        ),
    ] = None,
) -> None:
    """Audit a privacy claim: a lower bound of epsilon from canaries in one training run.

    Trains one client with DP-SGD, as a federation would, and compares what its ledger claims with what can be found;
    with -c privacy.mode=client or local, canaries are clients that each send an update of their own. A bound above the
    claim refutes it (exit code 1). A small bound proves nothing.
    """
    extras.require("privacy", "audit")
    settings = parse(BASE | ({} if noise else {"privacy.mode": "none"}) | overrides(run_config))
    if settings.model.task not in ("classification", "causal-lm"):
        raise ConfigError(
            f"model.task = {settings.model.task!r}: canaries are texts of one class, or of none; use classification"
        )
    if trials:
        _tell_times(settings, trials)
        return
    # These need torch, which the command's help does not.
    if settings.privacy.mode in PER_CLIENT:
        from bora_fl.simulations.audit.updates import run_update_audit as run
    else:
        from bora_fl.simulations.audit.canaries import run_audit as run
    result = run(settings, canaries, confidence=confidence)
    found, (within, without) = result.found, result.fell
    claim = (
        f"{result.claimed:.3f} per {result.unit} at delta {settings.privacy.delta:g}, noise multiplier "
        f"{result.noise_multiplier:.3f}"
        if math.isfinite(result.claimed)
        else "none: trained without privacy"
    )
    rows = (
        ("claimed epsilon", claim),
        (
            "lower bound",
            f"{found.epsilon:.3f} per {result.unit} at confidence {found.confidence:g}, {found.correct} of "
            f"{found.guesses} guesses right, {found.canaries} canaries",
        ),
        (
            "loss fell by" if result.unit == "record" else "mean score",
            f"{within:.3f} for canaries that were included, {without:.3f} for the others",
        ),
        ("verdict", "the claim is REFUTED" if result.refuted else "the claim is not refuted, which does not prove it"),
    )
    for name, text in rows[: 3 if math.isinf(result.claimed) else 4]:
        console.print(f"{name:16} {text}", highlight=False, soft_wrap=True)
    if result.refuted:
        raise typer.Exit(1)


def _tell_times(settings: Settings, trials: int) -> None:
    """Print what the time of a reply tells."""
    from bora_fl.simulations.audit.timing import run_time_audit

    found = run_time_audit(settings, trials)
    within, without = found.seconds
    rows = (
        ("allowed", f"AUC {found.allowed:.3f} at epsilon {settings.privacy.epsilon:g} per record"),
        ("reply at once", f"AUC {found.at_once:.3f} over {trials} rounds with a long record and {trials} without it"),
        ("on a schedule", f"AUC {found.scheduled:.3f} with reply-not-before = {found.every:.1f}"),
        ("CPU seconds", f"{within:.3f} with the record, {without:.3f} without"),
    )
    for name, text in rows:
        console.print(f"{name:16} {text}", highlight=False, soft_wrap=True)
