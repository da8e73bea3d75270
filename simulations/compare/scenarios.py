"""Named federations: how the data is dealt, who takes part, and how long clients train alone.

Rounds × local steps is the same in every scenario, so that methods meet equal work under different drift.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from bora_fl.config import ConfigError, Scalar, Settings, parse

_DIRICHLET = re.compile(r"dirichlet-(\d*\.?\d+)")
_NATURAL = re.compile(r"natural-([1-9]\d{0,3})")


@dataclass(frozen=True)
class Scenario:
    """One non-IID setting.

    Attributes:
        name: What ``--scenarios`` takes.
        summary: One line for lists and reports.
        overrides: The run-config keys that make it what it is.
        num_clients: Number of clients; 0 is the comparison's own number.
        drift: Local steps are multiplied by it and rounds divided by it.
        rank_shares: Ranks of the clients, in turn, as shares of the adapter's; empty where all have that.
    """

    name: str
    summary: str
    overrides: Mapping[str, Scalar] = field(default_factory=dict)
    num_clients: int = 0
    drift: float = 1.0
    rank_shares: tuple[float, ...] = ()

    def settings(self, base: Settings) -> Settings:
        """The comparison's settings under this scenario.

        Args:
            base: The settings that all scenarios share.

        Raises:
            ConfigError: If the overrides do not make valid settings.
        """
        flat = base.flat() | dict(self.overrides)
        if self.drift != 1:
            if not base.train.local_steps:
                raise ConfigError(
                    f"train.local-steps = 0 with --scenarios {self.name}: it scales the local steps; set a number of "
                    "them, or leave the scenario out"
                )
            steps = max(1, round(base.train.local_steps * self.drift))
            rounds = max(1, round(base.run.num_rounds * base.train.local_steps / steps))
            # As many evaluations as elsewhere, as far as there are rounds for them.
            every = max(1, round(base.run.evaluate_every * rounds / max(base.run.num_rounds, 1)))
            flat |= {"train.local-steps": steps, "run.num-rounds": rounds, "run.evaluate-every": every}
        return parse(flat)

    def clients(self, default: int) -> int:
        """Number of clients, given the comparison's own number."""
        return self.num_clients or default

    def node_configs(self, num_clients: int, rank: int) -> dict[int, dict[str, Scalar]]:
        """More node config by partition, as `simulations.engine.simulate` takes it."""
        if not self.rank_shares:
            return {}
        ranks = [max(1, round(share * rank)) for share in self.rank_shares]
        return {i: {"rank": ranks[i % len(ranks)]} for i in range(num_clients)}


def dirichlet(alpha: str) -> Scenario:
    """Labels dealt by shares drawn from Dirichlet(alpha); the text of the number is kept in the name."""
    how = "severe" if float(alpha) < 0.3 else "mild" if float(alpha) > 3 else "moderate"
    overrides: dict[str, Scalar] = {"data.partition": "dirichlet", "data.alpha": float(alpha)}
    return Scenario(f"dirichlet-{alpha}", f"{how} label skew, Dirichlet({alpha})", overrides)


_MODERATE: dict[str, Scalar] = {"data.partition": "dirichlet", "data.alpha": 0.5}

# RAVAN's protocol (arXiv:2506.05568), reduced: 20 Newsgroups, Dirichlet(.3), 20 clients, 3 a round, q and v.
_NEWSGROUPS: dict[str, Scalar] = {
    "data.name": "embedded:newsgroups20",
    "data.partition": "dirichlet",
    "data.alpha": 0.3,
    "strategy.fraction-train": 0.15,
    "strategy.fraction-evaluate": 0.15,
    "adapter.target-modules": "query,value",
}

_ROWS = (
    Scenario("natural", "four silos, a domain each", {"data.partition": "natural"}, num_clients=4),
    dirichlet("0.1"),
    dirichlet("1"),
    dirichlet("100"),
    Scenario(
        "pathological",
        "a client holds two classes only",
        {"data.partition": "pathological", "data.classes-per-client": 2},
    ),
    Scenario("size-skew", "the largest client has many times the smallest's examples", {"data.partition": "square"}),
    Scenario("few-steps", "a quarter of the local steps, four times the rounds", _MODERATE, drift=0.25),
    Scenario("many-steps", "four times the local steps, a quarter of the rounds", _MODERATE, drift=4.0),
    Scenario("few-clients", "three clients, all of them every round", _MODERATE, num_clients=3),
    Scenario(
        "many-clients",
        "forty clients, a fifth of them each round",
        _MODERATE | {"strategy.fraction-train": 0.2},
        num_clients=40,
    ),
    Scenario("iid", "examples dealt at random", {"data.partition": "iid"}),
    Scenario("one-client", "one client with all examples: central training", {"data.partition": "iid"}, num_clients=1),
    Scenario(
        "newsgroups",
        "20 Newsgroups, Dirichlet(0.3), 20 clients, three of them each round, from a random head",
        _NEWSGROUPS | {"head.init": "random"},
        num_clients=20,
    ),
    Scenario(
        "newsgroups-solved",
        "20 Newsgroups, Dirichlet(0.3), 20 clients, three of them each round, from the solved head",
        _NEWSGROUPS | {"head.init": "closed-form"},
        num_clients=20,
    ),
    Scenario("mixed-ranks", "clients of a quarter, half and all of the rank", _MODERATE, rank_shares=(0.25, 0.5, 1)),
)

SCENARIOS: dict[str, Scenario] = {row.name: row for row in _ROWS}


def scenario(name: str) -> Scenario:
    """A row of `SCENARIOS`, ``dirichlet-<alpha>`` for any alpha, or ``natural-<clients>`` for any number.

    Raises:
        ConfigError: For an unknown name, with near misses.
    """
    if name in SCENARIOS:
        return SCENARIOS[name]
    found = _DIRICHLET.fullmatch(name)
    if found and float(found[1]) > 0:
        return dirichlet(found[1])
    if silos := _NATURAL.fullmatch(name):
        return replace(
            SCENARIOS["natural"], name=name, summary=f"{silos[1]} silos by domain", num_clients=int(silos[1])
        )
    known = [*SCENARIOS, "dirichlet-<alpha>", "natural-<clients>"]
    raise ConfigError(f"--scenarios {name!r}: no such scenario; {near_misses(name, known)}")


def at_epsilon(row: Scenario, epsilon: str) -> Scenario:
    """A scenario in which every client trains with DP-SGD within a budget.

    Args:
        row: The scenario.
        epsilon: ε for each record at ``privacy.delta``, as text that is kept in the name; ``none`` trains as it is.

    Raises:
        ConfigError: If it is not a number above 0.
    """
    if epsilon == "none":
        return row
    try:
        value = float(epsilon)
    except ValueError:
        value = 0.0
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"--privacy {epsilon!r}: give epsilons above 0, or none for no privacy, such as none,6,3")
    return replace(
        row,
        name=f"{row.name}-epsilon-{epsilon}",
        summary=f"{row.summary}; DP-SGD, epsilon {epsilon} per record",
        overrides={
            **row.overrides,
            "privacy.mode": "record",
            "privacy.epsilon": value,
            "strategy.weighting": "uniform",
            "strategy.fraction-evaluate": 0.0,  # sites release no accuracies
        },
    )


def near_misses(name: str, known: Iterable[str]) -> str:
    """The end of an error message: what may have been meant, or all there is."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"
