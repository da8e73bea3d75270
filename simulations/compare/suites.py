"""Comparisons by name: what is compared where, on how many seeds, tuned or not."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from bora_fl.config import ConfigError, Scalar
from bora_fl.simulations.compare.scenarios import near_misses


@dataclass(frozen=True)
class Suite:
    """One comparison.

    Attributes:
        summary: What it is for.
        strategies: Names, or method/strategy, comma-separated.
        scenarios: Names, comma-separated.
        seeds: Number of seeds.
        tune: Whether each variant's learning rate is searched.
        baselines: Which references are measured.
        clients: Number of clients where a scenario has none of its own; 0 is the comparison's.
        config: Run config beside the comparison's own.
    """

    summary: str
    strategies: str
    scenarios: str
    seeds: int
    tune: bool = True
    baselines: tuple[str, ...] = ("local", "central", "iid")
    clients: int = 0
    config: Mapping[str, Scalar] = field(default_factory=dict)


SUITES: dict[str, Suite] = {
    "standard": Suite(
        "strategies under label skew and natural silos; a night on two cores",
        "fedavg,refactor,regmean,fedex,ffa,rolora,lora/fedavg,ravan/fedavg",
        "natural,dirichlet-0.1,dirichlet-1",
        seeds=4,
    ),
    "recipe": Suite(
        "the default settings under label skew, in natural silos and with examples dealt at random, eight seeds",
        "refactor",
        "natural,dirichlet-0.1,dirichlet-1,iid",
        seeds=8,
        tune=False,
        clients=5,
        config={"run.num-rounds": 12, "run.evaluate-every": 6, "data.max-test-examples": 0}
        | {"strategy.fraction-evaluate": 0.0, "strategy.evaluate-in-train": True},
    ),
    "retention": Suite(
        "RAVAN's protocol, reduced: how much of its IID accuracy each method keeps, from a random and a solved head",
        "lora/fedavg,lora/fedex,lora/ffa,fed-sb,dense-core/fedavg,ravan/fedavg,bora/fedavg,bora/refactor,full/fedavg",
        "newsgroups,newsgroups-solved",
        seeds=3,
        config={"run.num-rounds": 30, "run.evaluate-every": 10},
    ),
}


def suite(name: str) -> Suite:
    """A row of `SUITES`.

    Raises:
        ConfigError: For an unknown name, with near misses.
    """
    if name not in SUITES:
        raise ConfigError(f"--suite {name!r}: no such suite; {near_misses(name, SUITES)}")
    return SUITES[name]
