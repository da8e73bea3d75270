"""The runs of a comparison: which there are, and which there cannot be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bora_fl.config import ConfigError, Scalar, Settings, extensions, parse
from bora_fl.data import source_fingerprint
from bora_fl.models import peft_config
from bora_fl.paths import delete, state_in
from bora_fl.report import read_rows
from bora_fl.simulations import grid
from bora_fl.simulations.compare.scenarios import Scenario, at_epsilon, scenario
from bora_fl.simulations.engine import simulate
from bora_fl.strategies.aggregation import build
from bora_fl.strategies.catalogue import find
from bora_fl.strategies.presets import PRESETS

# Methods with what they need to train well from the defaults, which are made for low-rank adapters.
METHODS: dict[str, dict[str, Scalar]] = {
    "bora": {},
    # As many trained numbers in a square layer of width 384 as r = b = 8 has.
    "ravan": {"adapter.rank": 40, "adapter.num-blocks": 4, "adapter.alpha": 40.0},
    "dense-core": {"adapter.rank": 10, "adapter.num-blocks": 8, "adapter.alpha": 10.0},
    "lora": {},
    "dora": {},
    "gralora": {},
    "lokr": {},
    "vera": {"train.learning-rate": 2e-2},  # it trains two vectors a layer, which must move far
    "hra": {},
    "full": {"train.learning-rate": 5e-5},  # weights that are trained already
}
# What a comparison sets itself: its axes, and where and how the runs are done.
AXES = {
    "strategy.name": "--strategies",
    "adapter.method": "--methods",
    "run.seed": "--seeds",
    "run.output-dir": "--output",
    "run.resume": "nothing: finished runs are kept, others start anew",
    "run.threads": "--threads",
    "data.num-partitions": "--clients",
    "privacy.ledger-dir": "nothing: each run has a ledger of its own",
}
LEDGER = "ledger"
_NO_IDENTITY = ("run.output-dir", "run.threads", "run.resume", "run.keep-checkpoints")


@dataclass(frozen=True)
class Variant:
    """What is compared: an adapter method under a strategy."""

    method: str
    strategy: str

    @property
    def personal(self) -> bool:
        """Whether clients keep some of what they train, so that the server's own model is not the result."""
        row = find(self.strategy)
        return any(parts - row.shares for parts in row.schedule)

    def __str__(self) -> str:
        return f"{self.method}/{self.strategy}"


@dataclass(frozen=True)
class CompareRun(grid.Run):
    """One run: a variant in a scenario with a seed.

    Attributes:
        scenario: Name of the scenario.
        variant: Method and strategy.
        seed: The run seed: the partition, the clients sampled, the order of the data and all noise derive from it.
        num_clients: Number of clients.
        node_configs: More node config by partition.
        purpose: What it is run for where it is not compared itself: tune, reference, local-<client>.
        settings: Everything else.
        root: The comparison's folder.
    """

    scenario: str
    variant: Variant
    seed: int
    num_clients: int
    settings: Settings
    root: Path
    node_configs: dict[int, dict[str, Scalar]] = field(default_factory=dict)
    purpose: str = ""

    @property
    def name(self) -> str:
        """Scenario, purpose, method, strategy, seed."""
        place = "/".join(filter(None, (self.scenario, self.purpose)))
        return f"{place}/{self.variant.method}-{self.variant.strategy}/seed-{self.seed}"

    @property
    def identity(self) -> dict[str, object]:
        """The settings, the number of clients, their ranks and, of a client alone, which one it is."""
        config = {key: value for key, value in self.settings.flat().items() if key not in _NO_IDENTITY}
        ranks = {str(i): node["rank"] for i, node in self.node_configs.items() if "rank" in node}
        found: dict[str, object] = {"config": config, "num_clients": self.num_clients, "ranks": ranks}
        alone = [node["partition-id"] for node in self.node_configs.values() if "partition-id" in node]
        if code := extensions.code_digest(self.settings.flat()):  # of one's own parts, which a name alone does not tell
            found["code"] = code
        return found | ({"client": alone[0], "of": self.node_configs[0]["num-partitions"]} if alone else {})

    @property
    def run_settings(self) -> Settings:
        """The settings with the run's own folder, and in it the clients' ledgers: no run spends another's budget."""
        own: dict[str, Scalar] = {
            "run.output-dir": str(self.folder),
            "privacy.ledger-dir": str(self.folder / LEDGER),
        }
        return parse(self.settings.flat() | own)

    @property
    def cost(self) -> float:
        """Client steps in all; of a run without rounds, as many as a round has."""
        s = self.settings
        a_round = max(1.0, s.strategy.fraction_train * self.num_clients) * max(s.train.local_steps, 1)
        return max(s.run.num_rounds, 1) * a_round

    def work(self) -> grid.Result:
        """Run the federation; the result is its ``metrics.jsonl``, how many rows that has, and a digest of the data.

        Config, ledgers and log stay too; checkpoints and the adapter go, since nothing reads them and full
        fine-tuning's are large.
        """
        data = self._data()
        with state_in(self.folder / "state"):  # simulated sites leave no trace in the user's own state
            simulate(self.run_settings, self.num_clients, node_configs=self.node_configs)
        for name in ("checkpoints", "adapter"):
            delete(self.folder / name)
        return {"rows": self._rounds(), "data": data}

    def progress(self) -> float:
        """Its rounds so far, round 0 among them."""
        return self._rounds() / (1 + self.settings.run.num_rounds)

    def stands(self, result: grid.Result) -> bool:
        """Whether every round is in ``metrics.jsonl``, and the data's files are what they were.

        With ``run.patience`` there may be fewer rounds than were planned.
        """
        whole = self._rounds() == result.get("rows", 1 + self.settings.run.num_rounds)
        return whole and ("data" not in result or result["data"] == self._data())

    def _data(self) -> str:
        return source_fingerprint(self.settings.data, 0)

    def _rounds(self) -> int:
        return len(read_rows(self.folder / "metrics.jsonl"))

    def __str__(self) -> str:
        return " ".join(filter(None, (self.scenario, self.purpose, str(self.variant), f"seed {self.seed}")))


@dataclass(frozen=True)
class Plan:
    """All runs, in their order, and what cannot run, with the reason."""

    runs: list[CompareRun]
    skipped: dict[tuple[str, Variant], str]
    scenarios: list[Scenario]
    variants: list[Variant]

    def label(self, variant: Variant) -> str:
        """A variant's name in tables: without the method where all have the same, starred if it is personal."""
        name = variant.strategy if len({v.method for v in self.variants}) == 1 else str(variant)
        return f"{name} *" if variant.personal else name

    def reasons(self) -> list[str]:
        """What is skipped and why, a line for each variant and reason."""
        where: dict[tuple[Variant, str], list[str]] = {}
        for (name, variant), reason in self.skipped.items():
            where.setdefault((variant, reason), []).append(name)
        return [
            f"{variant} in {'every scenario' if len(names) == len(self.scenarios) else ', '.join(names)}: {reason}"
            for (variant, reason), names in where.items()
        ]


def plan(
    base: dict[str, Scalar],
    *,
    strategies: Sequence[str],
    scenarios: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    clients: int,
    root: Path,
    threads: int,
    privacy: Sequence[str] = (),
    chosen: dict[str, Scalar] | None = None,
    by_method: Mapping[str, Mapping[str, Scalar]] | None = None,
) -> Plan:
    """Lay out a comparison.

    Args:
        base: Run config of all runs, before the scenario's own keys.
        strategies: Names of presets, or ``all``; ``method/strategy`` is one variant, whatever the methods are.
        scenarios: Names of scenarios.
        methods: Adapter methods.
        seeds: The seeds.
        clients: Number of clients where the scenario has no number of its own.
        root: The comparison's folder.
        threads: Torch threads per run.
        privacy: Epsilons per record, or ``none``: each scenario once for every one of them; empty is without privacy.
        chosen: The user's own run config; it wins over `base` and over what a method needs.
        by_method: Run config of a method, over what it needs from the defaults.

    Returns:
        The plan. The runs of one scenario, seed and method are neighbours, so that a worker finds the base model and
        the data in memory.

    Raises:
        ConfigError: For unknown names, keys that are axes of the comparison, or if nothing at all can run.
    """
    chosen = chosen or {}
    rows = [at_epsilon(scenario(s), e) for s in dict.fromkeys(scenarios) for e in dict.fromkeys(privacy or ("none",))]
    _check_chosen(chosen, rows)
    variants = _variants(methods, strategies)
    for name, value in (("--seeds", len(seeds)), ("--clients", clients), ("--threads", threads)):
        if value < 1:
            raise ConfigError(f"{name} {value}: give at least 1")
    skipped: dict[tuple[str, Variant], str] = {}
    runs = []
    for row in rows:
        for seed in seeds:
            for variant in variants:
                own: dict[str, Scalar] = {
                    "strategy.name": variant.strategy,
                    "adapter.method": variant.method,
                    "run.seed": seed,
                    "run.threads": threads,
                    "run.keep-checkpoints": 1,
                }
                needed = METHODS.get(variant.method, {}) | dict((by_method or {}).get(variant.method, {}))
                flat = base | needed | chosen | own
                settings = row.settings(parse(flat))
                num_clients = row.clients(clients)
                node_configs = row.node_configs(num_clients, settings.adapter.rank)
                if reason := _impossible(settings, variant, bool(node_configs)):
                    skipped[row.name, variant] = reason
                    continue
                runs.append(CompareRun(row.name, variant, seed, num_clients, settings, root, node_configs))
    result = Plan(runs, skipped, rows, variants)
    if not runs:
        raise ConfigError("\n".join(result.reasons()))
    return result


def _variants(methods: Sequence[str], strategies: Sequence[str]) -> list[Variant]:
    """Every method under every strategy, and the pairs that are named, in their order."""
    names = list(PRESETS) if list(strategies) == ["all"] else list(strategies)
    crossed = [name for name in names if "/" not in name]
    found = [Variant(m, s) for m in methods for s in crossed]
    found += [Variant(*name.split("/", 1)) for name in names if "/" in name]
    for variant in found:
        find(variant.strategy, "--strategies")
    return list(dict.fromkeys(found))


def _check_chosen(chosen: dict[str, Scalar], scenarios: Sequence[Scenario]) -> None:
    problems = [
        f"{key} = {chosen[key]!r}: a comparison sets it itself; use {option}"
        for key, option in AXES.items()
        if key in chosen
    ]
    for key in sorted(chosen):
        owners = ", ".join(row.name for row in scenarios if key in row.overrides)
        problems += [f"{key} = {chosen[key]!r}: set by {owners}; leave out the key or the scenarios"] if owners else []
    if problems:
        raise ConfigError("\n".join(problems))


def _impossible(settings: Settings, variant: Variant, mixed_ranks: bool) -> str:
    """Why a variant cannot run under these settings; empty if it can."""
    if variant.method not in {*METHODS, "full"}:
        peft_config(settings.adapter, settings.model)  # names the methods there are if this is none
    try:
        build(settings)
    except ValueError as error:
        return str(error)
    if mixed_ranks and (why := find(variant.strategy).same_rank):
        return f"clients have different ranks: {why}"
    if mixed_ranks and variant.method not in {"bora", "lora"}:
        return "clients have different ranks, and this method has no factors to cut"
    return ""
