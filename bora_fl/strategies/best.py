"""The best round: a run ends with the adapter that has the least loss on the clients' held-out parts."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bora_fl.config import Settings
from bora_fl.report import ClientMetrics
from bora_fl.state import ALL, AdapterState, flatten, unflatten
from bora_fl.strategies.medians import tempered

_ADAPTER, _ROUND, _MEASURED = "adapter/", "round", "measured"


@dataclass(frozen=True)
class Best:
    """A round's adapter, and how it did on the clients' held-out parts.

    Attributes:
        round: The round whose merge, or solved head, it is.
        adapter: What clients evaluated.
        measured: Client to its loss, accuracy and number of held-out examples.
        fold_version: Of the frozen weights that it stands on, to which nothing is ever added back.
    """

    round: int
    adapter: AdapterState
    measured: Mapping[int, tuple[float, float, float]]
    fold_version: int = 0

    @classmethod
    def of(
        cls, round: int, adapter: AdapterState, metrics: Mapping[int, ClientMetrics], fold_version: int = 0
    ) -> "Best | None":
        """From what clients report; None if none of them reports a loss."""
        measured = {
            client: (m.eval_loss, m.eval_accuracy or 0.0, m.eval_examples)
            for client, m in metrics.items()
            if m.eval_loss is not None and m.eval_examples
        }
        return cls(round, adapter, measured, fold_version) if measured else None

    def beats(self, other: "Best | None") -> bool:
        """Whether its loss is lower than another's.

        Another's that stands on other frozen weights is beaten, since it cannot be gone back to.
        """
        return other is None or other.fold_version != self.fold_version or self.excess(other) < 0

    def excess(self, other: "Best") -> float:
        """By how much its mean loss is above another's, over the examples of those clients that measured both.

        No client's difference counts for more than `MEDIANS` median ones: a round is not one client's to choose.
        """
        both = sorted(self.measured.keys() & other.measured.keys())
        differences = tempered({k: [self.measured[k][0] - other.measured[k][0]] for k in both})
        examples = sum(self.measured[k][2] for k in both)
        difference = sum(self.measured[k][2] * differences[k][0] for k in both)
        return difference / examples if examples else 0.0

    def metrics(self) -> dict[int, ClientMetrics]:
        """Client to what it measured."""
        return {
            client: ClientMetrics(eval_loss=loss, eval_accuracy=accuracy, eval_examples=examples)
            for client, (loss, accuracy, examples) in self.measured.items()
        }

    def to_tensors(self) -> dict[str, Tensor]:
        """As named tensors, for a checkpoint."""
        rows = [[float(client), *values] for client, values in self.measured.items()]
        adapter = {f"{_ADAPTER}{name}": tensor.clone() for name, tensor in flatten(self.adapter).items()}
        numbers = torch.tensor([self.round, self.fold_version])
        return adapter | {_ROUND: numbers, _MEASURED: torch.tensor(rows, dtype=torch.float64)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Best":
        """The inverse of `to_tensors`."""
        flat = {name.removeprefix(_ADAPTER): t for name, t in tensors.items() if name.startswith(_ADAPTER)}
        measured = {int(row[0]): (row[1], row[2], row[3]) for row in tensors[_MEASURED].tolist()}
        round, fold_version = (int(number) for number in tensors[_ROUND])
        return cls(round, unflatten(flat), measured, fold_version)


def keeps_best(settings: Settings, shares: frozenset[str]) -> bool:
    """Whether the held-out losses of rounds can be compared, and an adapter is all that a round leaves.

    Args:
        settings: The run's.
        shares: The parts that leave the clients; what a client keeps cannot be gone back to.
    """
    strategy, privacy = settings.strategy, settings.privacy
    exact = privacy.mode == "none" and not privacy.secure_aggregation
    comparable = strategy.evaluate_in_train and strategy.fraction_train == 1
    return settings.run.keep_best and exact and comparable and shares == ALL
