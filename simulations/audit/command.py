"""``bora-fl audit``: a lower bound of ε from one training run."""

import math
from typing import Annotated

import typer
from rich.console import Console

from bora_fl.config import Scalar, overrides, parse

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
console = Console()


def audit(
    canaries: Annotated[int, typer.Option(help="canaries drawn; about half of them are trained on")] = 512,
    noise: Annotated[
        bool, typer.Option(help="--no-noise trains without privacy, to see what an audit can find")
    ] = True,
    confidence: Annotated[float, typer.Option(help="probability with which the bound holds")] = 0.95,
    run_config: Annotated[
        list[str] | None,
        typer.Option(
            "--run-config", "-c", help="key=value, may be given several times; `bora-fl config` lists the keys"
        ),
    ] = None,
) -> None:
    """Audit a privacy claim: a lower bound of epsilon from canaries in one training run.

    Trains one client with DP-SGD, as a federation would, and compares what its ledger claims with what can be found. A
    bound above the claim refutes it (exit code 1). A small bound proves nothing.
    """
    # These need torch, which the command's help does not.
    from bora_fl.simulations.audit.canaries import run_audit

    settings = parse(BASE | ({} if noise else {"privacy.mode": "none"}) | overrides(run_config))
    result = run_audit(settings, canaries, confidence=confidence)
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
        ("loss fell by", f"{within:.3f} for canaries trained on, {without:.3f} for the others"),
        ("verdict", "the claim is REFUTED" if result.refuted else "the claim is not refuted, which does not prove it"),
    )
    for name, text in rows[: 3 if math.isinf(result.claimed) else 4]:
        console.print(f"{name:16} {text}", highlight=False, soft_wrap=True)
    if result.refuted:
        raise typer.Exit(1)
