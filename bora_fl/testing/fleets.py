"""Made-up federations, what clients made of what they were sent, in float64, and dense oracles of a merge."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bora_fl.blocks.gram import gram_of
from bora_fl.config import AdapterSettings, RunSettings, Settings, StrategySettings
from bora_fl.state import AdapterState, ClientUpdate
from bora_fl.strategies.aggregation import Aggregator, build
from bora_fl.strategies.made_up import Transform, drifted, factors
from bora_fl.strategies.server_state import ServerState

LAYERS = {"query": (24, 16)}


@dataclass
class Federation:
    """A fleet that trains in a made-up way: every trained factor drifts from what was sent, by a seeded amount.

    Attributes:
        blocks: b.
        transform: As for ``adapter.sigma-transform``.
        plain: Plain LoRA: Sigma is 1 and stays it.
        rank: r.
        drift: Size of what training adds.
        dtype: Of the factors.
    """

    blocks: int
    transform: Transform
    plain: bool = False
    rank: int = 4
    drift: float = 0.4
    dtype: torch.dtype = torch.float64

    def built(self, name: str, seed: int = 0, **settings: Any) -> Aggregator:
        """A strategy for this fleet."""
        method = "lora" if self.plain else "bora"
        adapter = AdapterSettings(method=method, num_blocks=self.blocks, sigma_transform=self.transform)
        strategy = StrategySettings(name=name, **settings)
        return build(Settings(strategy=strategy, adapter=adapter, run=RunSettings(seed=seed)))

    def initial(self, seed: int = 0, trained: bool = True) -> AdapterState:
        """The adapter before the round; `trained` makes B non-zero."""
        g = torch.Generator().manual_seed(seed)
        form: dict[str, Any] = {"rank": self.rank, "blocks": self.blocks, "transform": self.transform}
        form |= {"plain": self.plain, "trained": trained, "dtype": self.dtype}
        layers = {name: factors(g, m, n, **form) for name, (m, n) in LAYERS.items()}
        return AdapterState(layers, {"head": torch.randn(3, 5, generator=g).to(self.dtype)})

    def train(self, sent: AdapterState, parts: frozenset[str], seed: int, size: float = 1.0) -> AdapterState:
        """One client's state after local training of some parts."""
        g = torch.Generator().manual_seed(seed)
        drift = self.drift * size
        layers = {n: drifted(g, f, parts, drift, self.transform, self.plain) for n, f in sent.layers.items()}
        noise_head = torch.randn(sent.tensors["head"].shape, generator=g, dtype=torch.float64)
        return AdapterState(layers, {"head": sent.tensors["head"] + size * noise_head.to(self.dtype)})

    def round(
        self,
        aggregator: Aggregator,
        clients: int = 4,
        round: int = 1,
        seed: int = 0,
        trained: bool = True,
        weights: Sequence[float] = (),
    ) -> tuple[ServerState, list[ClientUpdate]]:
        """A prepared state and the updates of a round on it."""
        state = aggregator.prepare(ServerState.start(self.initial(seed, trained)), round)
        parts = aggregator.trains(round)
        given = list(weights) or [1.0 + k for k in range(clients)]
        updates = [
            ClientUpdate(
                10 + k,
                given[k],
                self.train(state.current, parts, 1000 * seed + k + 1),
                self.grams(aggregator.gram, 1000 * seed + k + 1),
            )
            for k in range(clients)
        ]
        return state, updates

    def grams(self, kind: Literal["", "blocks", "diagonal"], seed: int) -> dict[str, Tensor]:
        """Gram matrices of inputs that are stronger in some directions than in others; none if `kind` is empty."""
        g = torch.Generator().manual_seed(seed)
        found = {}
        for name, (_, n) in LAYERS.items():
            x = torch.randn(64, n, generator=g, dtype=torch.float64) * torch.linspace(0.2, 2.0, n)
            if kind:
                found[name] = gram_of(x @ torch.randn(n, n, generator=g, dtype=torch.float64), self.blocks, kind) / 64
        return found


def model(state: ServerState) -> dict[str, Tensor]:
    """The change of every frozen weight that a client starts from: adapter plus fold, dense."""
    return {
        name: f.dense() + (state.fold[name].dense() if name in state.fold else 0.0)
        for name, f in state.current.layers.items()
    }


def mean_product(updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
    """The weighted mean of the clients' dense updates."""
    total = sum(update.weight for update in updates)
    return {
        name: sum((u.weight / total * u.state.layers[name].dense() for u in updates), torch.tensor(0.0))
        for name in updates[0].state.layers
    }


def gap(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest relative Frobenius distance over the layers."""
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


FLEETS: dict[str, Federation] = {
    "bora exp_norm": Federation(4, "exp_norm"),
    "bora identity": Federation(4, "identity"),
    "one block": Federation(1, "exp_norm"),
    "one block identity": Federation(1, "identity"),
    "lora": Federation(1, "identity", plain=True),
}
"""BoRA under both transforms, one block under both, and plain LoRA."""
