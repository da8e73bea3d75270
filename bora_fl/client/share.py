"""A process's share of every batch, where several processes train one client together.

Process p of P takes rows p, p + P, … of each batch. Every process knows the whole batch, so that its loss is the sum
over its own rows divided by the targets of all rows of the step. The sums over the processes are then loss and gradient
of the whole step, each process takes the same step with them, and all hold the same weights.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.distributed import FileStore, ProcessGroupGloo  # type: ignore[attr-defined]

LONGEST = timedelta(minutes=30)
"""How long a process waits for the others; one that ends is noticed at once."""


class StoppedError(Exception):
    """Another process of this client has ended the training."""


class Share:
    """What one process does of a client's training.

    Adapters are small, so their gradients go through the host's memory, by gloo, whatever the device is.

    Args:
        rank: Which process, from 0.
        size: Out of how many.
        group: Connects them.
        in_step: Whether all must take the same passes through the model, since its weights are shared out.

    Attributes:
        agreed: Whether the training has ended in all processes, because one of them said so.
    """

    def __init__(self, rank: int, size: int, group: Any, in_step: bool = False) -> None:
        self.rank, self.size, self.in_step, self.agreed = rank, size, in_step, False
        self._group = group

    def rows(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions of a batch that are this process's; there may be none."""
        return indices[self.rank :: self.size]

    def add_up(self, parameters: Sequence[nn.Parameter], loss: float) -> float:
        """Sum gradients, in place, and loss over the processes.

        Args:
            parameters: The same in every process. One that has no gradient in any of them keeps none.
            loss: This process's.
        """
        have = [float(p.grad is not None) for p in parameters]
        grads = [torch.zeros(p.numel()) if p.grad is None else p.grad.reshape(-1).float().cpu() for p in parameters]
        flat = torch.cat([torch.tensor([loss, *have]), *grads])
        self._sum(flat)
        head, summed = flat[: 1 + len(have)], flat[1 + len(have) :]
        pieces = torch.split(summed, [p.numel() for p in parameters])
        for parameter, piece, count in zip(parameters, pieces, head[1:].tolist(), strict=True):
            if count:
                parameter.grad = piece.view(parameter.shape).to(parameter)
        return float(head[0])

    def report(self, on_step: Callable[[int, int], None] | None, step: int, steps: int) -> None:
        """Call `on_step`; what it raises in one process ends the training in all.

        Raises:
            StoppedError: In the other processes.
        """
        error: BaseException | None = None
        try:
            if on_step:
                on_step(step, steps)
        except BaseException as raised:
            error = raised
        stopped = torch.tensor([float(error is not None)])
        self._sum(stopped)
        self.agreed = bool(stopped)
        if error:
            raise error
        if self.agreed:
            raise StoppedError

    def _sum(self, tensor: torch.Tensor) -> None:
        self._group.allreduce([tensor]).wait()


def connect(store: FileStore, rank: int, size: int) -> Any:
    """Connect this process with the others, which must call this too.

    Not torch's default group: other libraries would take its existence for a distributed run of their own.
    """
    return ProcessGroupGloo(store, rank, size, timeout=LONGEST)
