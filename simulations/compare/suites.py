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
        tune_seeds: On how many seeds.
        baselines: Which references are measured.
        clients: Number of clients where a scenario has none of its own; 0 is the comparison's.
        config: Run config beside the comparison's own.
        methods: Run config by adapter method, over `config`.
    """

    summary: str
    strategies: str
    scenarios: str
    seeds: int
    tune: bool = True
    tune_seeds: int = 2
    baselines: tuple[str, ...] = ("local", "central", "iid")
    clients: int = 0
    config: Mapping[str, Scalar] = field(default_factory=dict)
    methods: Mapping[str, Mapping[str, Scalar]] = field(default_factory=dict)


# In a square layer of width 384, r = b = 8 trains 6,656 numbers, LoRA of rank 9 6,912 and of rank 8 6,144.
LORA_OF_THE_SAME_SIZE: dict[str, Scalar] = {"adapter.rank": 9, "adapter.alpha": 18.0}

SUITES: dict[str, Suite] = {
    "standard": Suite(
        "strategies under label skew and natural silos; two to three hours on two cores",
        "fedavg,refactor,regmean,fedex,ffa,rolora,lora/fedavg,ravan/fedavg",
        "natural,dirichlet-0.1,dirichlet-1",
        seeds=3,
        tune_seeds=1,
        baselines=("central", "iid"),
        clients=5,
        config={
            "model.max-length": 32,
            "data.max-train-examples": 4000,
            "train.local-steps": 8,
            "run.evaluate-every": 8,
        },
        methods={"lora": LORA_OF_THE_SAME_SIZE},
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
    "merging": Suite(
        "rules for the clients' factors where they may differ: label skew, long rounds, many clients; random head",
        "bora/fedavg,bora/refactor,bora/regmean,bora/fedex",
        "dirichlet-0.1,many-steps,many-clients",
        seeds=3,
        tune=False,
        baselines=(),
        clients=10,
        config={
            "head.init": "random",
            "head.solve-again": "never",
            "run.num-rounds": 8,
            "run.evaluate-every": 8,
            "run.keep-best": False,
            "train.local-steps": 8,
            "data.max-train-examples": 4000,
            "data.max-test-examples": 2000,
        },
        methods={"lora": LORA_OF_THE_SAME_SIZE},
    ),
    "methods": Suite(
        "adapter methods of about equally many trained parameters, central, from a random head, eight seeds",
        "bora/fedavg,lora/fedavg,dora/fedavg,gralora/fedavg,ravan/fedavg,full/fedavg",
        "one-client",
        seeds=8,
        baselines=(),
        config={
            "head.init": "random",
            "run.num-rounds": 1,
            "run.evaluate-every": 1,
            "run.keep-best": False,
            "train.local-steps": 250,
            "train.batch-size": 16,
            "data.max-test-examples": 2000,
        },
        methods={"lora": LORA_OF_THE_SAME_SIZE},
    ),
    "language": Suite(
        "SmolLM2 on instructions: BoRA and LoRA of equally many trained parameters, averaged and refactorized",
        "bora/refactor,bora/fedavg,lora/fedavg,lora/refactor",
        "natural,iid",
        seeds=3,
        tune=False,
        baselines=("central", "iid"),
        clients=4,
        config={
            "model.name": "embedded:smollm2",
            "model.task": "causal-lm",
            "model.max-length": 96,
            "data.name": "embedded:docstrings4",
            "data.max-train-examples": 2000,
            "data.max-test-examples": 96,
            "adapter.target-modules": "q_proj,v_proj",
            # b = 8 adds b² r numbers a layer: in SmolLM2's q and v, r = 15 trains as many as LoRA of rank 16.
            "adapter.num-blocks": 8,
            "adapter.rank": 15,
            "adapter.alpha": 30.0,
            "train.batch-size": 4,
            "train.local-steps": 4,
            "run.num-rounds": 3,
            "run.evaluate-every": 3,
            "run.generate-every": 3,
            "run.generate-examples": 16,
            "run.generate-tokens": 24,
            "strategy.fraction-evaluate": 0.0,
        },
        methods={"lora": {"adapter.rank": 16, "adapter.alpha": 32.0}},
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
