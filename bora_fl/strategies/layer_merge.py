"""What a merge rule sees of one layer in one round, and what it returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from bora_fl.blocks import BlockFactors, merge
from bora_fl.config import StrategySettings
from bora_fl.state import ALL

Trains = frozenset[str]


@dataclass(frozen=True)
class LayerRound:
    """One layer in one round.

    Attributes:
        current: The factors that the clients were sent.
        updates: The factors that they returned, in the order of their ids; empty before training.
        weights: One positive weight per update; they sum to one.
        trains: The parts that were (or will be) trained this round.
        rank: The global adapter's rank in this layer.
        grams: One Gram matrix of the layer's inputs per update (`bora_fl.blocks.gram`); empty where any has none.
        carried: What an earlier round's rank could not hold, if it is kept on the server.
        velocity: The product's velocity after the last round, if there is one.
        sigma_transform: `"exp_norm"` (Sigma must stay positive with `mean|log Sigma| = 1`) or `"identity"`.
        settings: The strategy's settings.
        seed: Seed of this layer in this round.
    """

    current: BlockFactors
    rank: int
    trains: Trains = ALL
    updates: Sequence[BlockFactors] = ()
    weights: Sequence[float] = ()
    grams: Sequence[Tensor] = ()
    carried: BlockFactors | None = None
    velocity: BlockFactors | None = None
    sigma_transform: str = "exp_norm"
    settings: StrategySettings = field(default_factory=StrategySettings)
    seed: int = 0

    def mean_parts(self) -> tuple[list[BlockFactors], list[float]]:
        """Updates and weights whose weighted sum is `mean_product`."""
        return self._and_carried(list(self.updates), list(self.weights))

    def mean_product(self) -> BlockFactors:
        """The mean of the clients' products plus what was carried, stacked: `Σ_k w_k delta_W^k + carried`."""
        return merge(*self.mean_parts())

    def next_parts(self) -> tuple[list[BlockFactors], list[float]]:
        """Updates and weights whose weighted sum is where a step from the received product `X` towards the mean leads.

        `mean_product` by default. With `Δ = Σ_k w_k delta_W^k − X`, a = ``strategy.product-step`` and β =
        ``strategy.product-momentum``, Nesterov's momentum on the product (as server momentum: Hsu et al.,
        arXiv:1909.06335; the look-ahead: Sutskever et al., ICML 2013):

            V ← β V + Δ,    X ← X + carried + a (Δ + β V)

        β = 0 is the moving average of mean and X. What was carried is part of where the server stands, as X is, and no
        part of the step: else a step beyond the mean would make it grow from round to round.
        """
        a, beta = self.settings.product_step, self.settings.product_momentum
        if a == 1 and beta == 0:
            return self.mean_parts()
        reach = a * (1 + beta)
        parts, weights = [*self.updates, self.current], [*(reach * weight for weight in self.weights), 1 - reach]
        if self.velocity is not None:
            parts, weights = [*parts, self.velocity], [*weights, a * beta**2]
        return self._and_carried(parts, weights)

    def _and_carried(self, parts: list[BlockFactors], weights: list[float]) -> tuple[list[BlockFactors], list[float]]:
        return (parts, weights) if self.carried is None else ([*parts, self.carried], [*weights, 1.0])

    def next_product(self) -> BlockFactors:
        """The sum of `next_parts`, stacked."""
        return merge(*self.next_parts())


class LayerMerge(NamedTuple):
    """The outcome of one layer.

    Attributes:
        current: What the clients receive next.
        carried: What the server keeps and adds to the next merge.
        fold: The base delta: what the clients add to the frozen weight before they train on `current`.
        velocity: The product's velocity, for the next merge.
    """

    current: BlockFactors
    carried: BlockFactors | None = None
    fold: BlockFactors | None = None
    velocity: BlockFactors | None = None


LayerRule = Callable[[LayerRound], LayerMerge]
"""Merges a layer, or readies it. Sigma may be any: the aggregator normalizes it."""

RestRule = Callable[[LayerRound, BlockFactors], LayerMerge]
"""Settles what the merged factors, Sigma normalized, do not hold of the mean product."""
