"""Merging clients one at a time, in memory that does not grow with their number."""

from __future__ import annotations

from bora_fl.blocks.block_cores import BlockCores, add_up
from bora_fl.blocks.factors import BlockFactors
from bora_fl.blocks.merging import merge

_CAPACITY_PER_RANK = 8


class StreamingMerge:
    """Running weighted sum of updates, `Σ_k w_k delta_W^k`.

    Clients are stacked, exactly, until their ranks add up to more than `capacity`; then the stack becomes cores that
    keep the `capacity` most energetic directions of every block row and block column. Layers whose blocks have at
    most `capacity` rows and columns lose nothing however many clients come. Otherwise what is lost is bounded by
    `discarded`: the result is that close, in Frobenius norm, to the exact sum, whatever the order of the clients and
    the shape of the tree of partial merges. So two such results differ by at most the sum of their bounds (and
    rounding of the storage dtype).

    Args:
        capacity: Directions kept a block, at least 1. Default: eight times the first client's rank.

    Raises:
        ValueError: If the capacity is below 1.
    """

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity is {capacity}; give at least 1, several times the rank to keep most of the sum")
        self.capacity = capacity
        self.count = 0
        self.total_weight = 0.0
        self._stacked: list[BlockFactors] = []
        self._cores: BlockCores | None = None

    @property
    def discarded(self) -> float:
        """Upper bound of the Frobenius norm of `exact sum − result()`, rounding of the storage dtype aside."""
        return 0.0 if self._cores is None else self._cores.discarded

    def add(self, factors: BlockFactors, weight: float) -> None:
        """Add one client's update, times a weight.

        Raises:
            ValueError: If the layer differs from what was added before or the weight is not finite.
        """
        self._check(factors)
        self._stack(merge([factors], [weight]))
        self.count += 1
        self.total_weight += float(weight)

    def combine(self, other: StreamingMerge) -> None:
        """Add what another merge holds, as if its clients had been added here; the other one stays as it is.

        Raises:
            ValueError: If the layers differ.
        """
        if other._cores is not None:
            self._check(other._cores)
            self._cores = other._cores if self._cores is None else add_up([self._cores, other._cores], self._limit())
        for factors in other._stacked:
            self._check(factors)
            self._stack(factors)
        self.count += other.count
        self.total_weight += other.total_weight

    def result(self) -> BlockFactors | BlockCores:
        """The weighted sum: stacked factors while nothing was compressed, else cores.

        Raises:
            ValueError: If nothing was added.
        """
        return self._scaled(1.0)

    def mean(self) -> BlockFactors | BlockCores:
        """The weighted mean, `result()` divided by the total weight.

        Raises:
            ValueError: If nothing was added or the weights sum to zero.
        """
        if self.count and self.total_weight == 0:
            raise ValueError("the weights sum to 0; give weights whose sum is not zero")
        return self._scaled(1 / self.total_weight if self.count else 1.0)

    def _scaled(self, weight: float) -> BlockFactors | BlockCores:
        if self._cores is None:
            if not self._stacked:
                raise ValueError("nothing was merged; add at least one client")
            return merge(self._stacked, [weight] * len(self._stacked))
        self._compress()
        return self._cores.scaled(weight)

    def _stack(self, factors: BlockFactors) -> None:
        if self.capacity is None:
            self.capacity = _CAPACITY_PER_RANK * factors.rank
        if self._stacked and sum(f.rank for f in self._stacked) + factors.rank > self._limit():
            self._compress()
        self._stacked.append(factors)

    def _compress(self) -> None:
        if self._stacked:
            stack = merge(self._stacked, [1.0] * len(self._stacked))
            self._cores = add_up([stack] if self._cores is None else [self._cores, stack], self._limit())
            self._stacked = []

    def _limit(self) -> int:
        assert self.capacity is not None
        return self.capacity

    def _check(self, update: BlockFactors | BlockCores) -> None:
        held = self._cores if self._cores is not None else (self._stacked[0] if self._stacked else None)
        if held is not None and (update.shape, update.num_blocks) != (held.shape, held.num_blocks):
            raise ValueError(
                f"this update is of a {update.shape} weight in {update.num_blocks} blocks, those merged so far are of a"
                f" {held.shape} one in {held.num_blocks}; keep one merge a layer"
            )
