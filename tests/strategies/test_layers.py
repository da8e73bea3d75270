"""Layers that are merged at once: as many as threads and memory allow, with the results of one after the other."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from bora_fl.blocks.planted import drifting_clients
from bora_fl.config import AdapterSettings, Settings, StrategySettings
from bora_fl.state import AdapterState, ClientUpdate, flatten
from bora_fl.strategies.aggregation import build
from bora_fl.strategies.layers import each_layer
from bora_fl.strategies.merge_report import measured
from bora_fl.strategies.server_state import ServerState

NAMES = [f"layer.{k}" for k in range(5)]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("memory", "at_once"), [(10**9, 2), (1, 1)])
def test_as_many_layers_are_at_work_as_threads_and_memory_allow(two_threads: None, memory: int, at_once: int):
    at_work, most, lock = 0, 0, threading.Lock()

    def work(name: str) -> str:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.02)
        with lock:
            at_work -= 1
        return name.upper()

    assert each_layer(work, NAMES, 1000, memory) == {name: name.upper() for name in NAMES}
    assert list(each_layer(work, NAMES, 1000, memory)) == NAMES
    assert most == at_once
    assert torch.get_num_threads() == 2


def test_an_error_in_a_layer_is_raised_and_the_threads_are_as_before(two_threads: None):
    def work(name: str) -> None:
        raise ValueError(name)

    with pytest.raises(ValueError, match=NAMES[0]):
        each_layer(work, NAMES, 1, 10**9)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("strategy", ["fedavg", "refactor", "flora"])
def test_layers_at_once_give_the_adapter_and_report_of_one_after_the_other(two_threads: None, strategy: str):
    layers = [drifting_clients(seed, 4, 24, 16, 4, 3) for seed in range(len(NAMES))]
    states = [
        AdapterState({name: layer[k].to(torch.float32) for name, layer in zip(NAMES, layers, strict=True)})
        for k in range(4)
    ]
    updates = [ClientUpdate(k, k + 1.0, state) for k, state in enumerate(states)]
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        settings = Settings(strategy=StrategySettings(name=strategy), adapter=AdapterSettings(rank=3, num_blocks=4))
        found.append(build(settings).aggregate(ServerState.start(states[0]), updates, 1))
    (one, first), (other, second) = found
    assert first == second
    assert all(torch.equal(t, flatten(other.current)[name]) for name, t in flatten(one.current).items())


def test_of_many_layers_the_report_measures_some():
    assert measured(NAMES) == NAMES
    assert measured([str(k) for k in range(128)]) == [str(k) for k in range(0, 128, 5)]
