"""What processes that train together exchange, between two threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed import FileStore

from bora_fl.client.processes import loopback
from bora_fl.client.share import Share, StoppedError, connect


@pytest.fixture
def together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Calls a function with each of two connected shares at once, and returns what each returned or raised."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", loopback())

    def both(function: Callable[[Share], object]) -> list[object]:
        def one(rank: int) -> object:
            share = Share(rank, 2, connect(FileStore(str(tmp_path / "store"), 2), rank, 2))
            try:
                return function(share)
            except Exception as error:
                return error, share.agreed

        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(one, range(2)))

    return both


def test_every_row_of_a_batch_has_one_process():
    rows = [Share(rank, 3, None).rows(np.arange(10, 17)) for rank in range(3)]
    assert [list(found) for found in rows] == [[10, 13, 16], [11, 14], [12, 15]]
    assert len(Share(2, 3, None).rows(np.arange(2))) == 0


def test_gradients_and_loss_are_summed_and_what_nobody_has_stays_away(together: Callable):
    def step(share: Share) -> tuple[float, list[torch.Tensor | None]]:
        parameters = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(3)]
        parameters[0].grad = torch.full((2, 2), 1.0 + share.rank)
        if share.rank:  # the other one had no row that reaches it
            parameters[1].grad = torch.ones(2, 2)
        return share.add_up(parameters, 0.5 + share.rank), [p.grad for p in parameters]

    for loss, (both, one, nobody) in together(step):
        assert loss == 2.0
        assert torch.equal(both, torch.full((2, 2), 3.0))
        assert torch.equal(one, torch.ones(2, 2))
        assert nobody is None


def test_a_stop_in_one_process_ends_the_training_in_all(together: Callable):
    def train(share: Share) -> None:
        def on_step(step: int, steps: int) -> None:
            if step == 2 and share.rank == 0:
                raise KeyError("nobody waits any more")

        for step in range(1, 5):
            share.report(on_step, step, 4)

    (first, agreed), (second, also) = together(train)
    assert isinstance(first, KeyError)
    assert isinstance(second, StoppedError)
    assert agreed
    assert also
