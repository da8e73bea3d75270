"""Updates that wait for their merge in memory and in a file: the same bits, whatever order the replies come in."""

import functools
import itertools
import tempfile
from collections.abc import Sequence

import pytest
import torch
from flwr.app import ConfigRecord

from bora_fl.blocks import BlockFactors
from bora_fl.blocks.planted import drifting_clients
from bora_fl.config import AdapterSettings, Settings, StrategySettings, parse
from bora_fl.state import AdapterState, ClientUpdate, flatten
from bora_fl.strategies import intake
from bora_fl.strategies.aggregation import build
from bora_fl.strategies.base import FederatedStrategy
from bora_fl.strategies.holding import Held, StoredState
from bora_fl.strategies.observer import RunFailedError
from bora_fl.strategies.screening import screen
from bora_fl.strategies.server_state import ServerState
from bora_fl.wire.records import to_arrays
from tests.strategies.four_nodes import CONFIG, Grid, adapter

RANK = 3


def states(transform: str, ranks: Sequence[int] = (RANK,) * 4) -> list[AdapterState]:
    """Clients' states of two layers and a head."""
    whole = [drifting_clients(seed, len(ranks), 24, 16, 4, RANK) for seed in range(2)]
    found = []
    for k, rank in enumerate(ranks):
        layers = {}
        for name, layer in zip("qv", whole, strict=True):
            sigma = layer[k].sigma.abs() + 0.1
            sigma = (sigma.log() / sigma.log().abs().mean()).exp() if transform == "exp_norm" else sigma
            layers[name] = BlockFactors(layer[k].B[:, :rank], sigma[..., :rank], layer[k].A[:rank], 1.5).to(
                torch.float32
            )
        tensors = {"head": torch.randn(3, 5, generator=torch.Generator().manual_seed(k)), "count": torch.tensor(k)}
        found.append(AdapterState(layers, tensors))
    return found


def held(updates: Sequence[ClientUpdate], memory_bytes: int) -> list[ClientUpdate]:
    holder = Held(memory_bytes, AdapterState())
    return [holder.hold(update) for update in updates]


def same(one: AdapterState, other: AdapterState) -> bool:
    first, second = flatten(one), flatten(other)
    return first.keys() == second.keys() and all(
        first[n].dtype == second[n].dtype and torch.equal(first[n], second[n]) for n in first
    )


def test_what_comes_back_is_what_was_held():
    (state, *_) = states("identity")
    odd = {
        "half": torch.arange(6).to(torch.bfloat16).reshape(2, 3).T,
        "none": torch.zeros(0, 4),
        "long": torch.tensor(7),
    }
    update = ClientUpdate(3, 2.0, AdapterState(state.layers, odd), {"q": torch.eye(3, dtype=torch.float64)})
    (found,) = held([update], 0)
    assert isinstance(found.state, StoredState)
    assert same(found.state, update.state)
    assert [found.state.rank(name) for name in found.state.layers] == [RANK, RANK]
    assert torch.equal(found.grams["q"], update.grams["q"])
    assert (found.client, found.weight) == (3, 2.0)


def test_updates_stay_in_memory_while_there_is_room_and_what_was_sent_takes_none():
    sent, *others = states("identity")
    moved = [
        {name: BlockFactors(other.layers[name].B, f.sigma, f.A) for name, f in sent.layers.items()} for other in others
    ]
    changed = [ClientUpdate(k, 1.0, AdapterState(layers)) for k, layers in enumerate(moved)]
    size = 2 * 4 * 24 * RANK  # B of two layers
    holder = Held(size, sent)
    first, *rest = [holder.hold(update) for update in changed]
    assert first is changed[0]
    assert all(isinstance(update.state, StoredState) for update in rest)
    assert holder._file is not None
    assert holder._file.end == 2 * size
    assert rest[0].state.layers["q"].A is sent.layers["q"].A


def test_without_a_temporary_folder_the_run_ends_in_words(monkeypatch: pytest.MonkeyPatch):
    def none(**_: object) -> str:
        raise FileNotFoundError("No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "TemporaryFile", none)
    monkeypatch.setattr(tempfile, "gettempdir", none)
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(RunFailedError, match=r"No usable temporary directory.*another folder in TMPDIR"):
        Held(0, AdapterState()).hold(ClientUpdate(0, 1.0, AdapterState({}, {"head": torch.ones(2)})))


def test_a_full_disk_ends_the_run_in_words(monkeypatch: pytest.MonkeyPatch):
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(RunFailedError, match=r"No space left.*TMPDIR, or raise strategy\.memory-mb"):
        held([ClientUpdate(0, 1.0, states("identity")[0])], 1)


@pytest.mark.parametrize("transform", ["exp_norm", "identity"])
@pytest.mark.parametrize(
    ("strategy", "ranks", "changes"),
    [
        ("fedavg", (3, 3, 3, 3), {}),
        ("fedavg", (3,), {}),
        ("refactor", (3, 3, 3, 3), {}),
        ("refactor", (1, 3, 2, 3), {"refit": "all", "residual": "carry"}),
        ("hetlora", (1, 3, 2, 3), {}),
        ("flora", (1, 3, 2, 3), {}),
        ("refactor", (3, 3, 3, 3), {"robust": "krum", "min_cosine": 0.0, "max_update_norm": 1e3}),
        ("fedavg", (3, 3, 3, 3), {"robust": "median"}),
    ],
)
def test_the_merge_is_the_same_bit_for_bit_for_every_order_and_place(transform, strategy, ranks, changes):
    given = states(transform, ranks)
    settings = StrategySettings(name=strategy, **changes)
    aggregator = build(
        Settings(strategy=settings, adapter=AdapterSettings(rank=3, num_blocks=4, sigma_transform=transform))
    )
    start = ServerState.start(states(transform)[0])
    updates = [ClientUpdate(k, k + 1.0, state) for k, state in enumerate(given)]
    merge = functools.partial(aggregator.aggregate, start, round=1)
    wanted, report = merge(updates=screen(updates, start, settings)[0])
    for order in list(itertools.permutations(range(len(given))))[::7]:
        for room in (0, 2000):
            waiting = sorted(held([updates[k] for k in order], room), key=lambda update: update.client)
            found, again = merge(updates=screen(waiting, start, settings)[0])
            assert same(found.current, wanted.current)
            assert again == report


@pytest.mark.parametrize("strategy", ["refactor", "ffa"])
def test_a_round_is_the_same_for_every_order_of_replies(monkeypatch: pytest.MonkeyPatch, strategy: str):
    results = []
    for order, room in (((0, 1, 2, 3), 10**9), ((3, 1, 0, 2), 10**9), ((2, 3, 1, 0), 0)):
        monkeypatch.setattr(intake, "Held", lambda _, sent, room=room: Held(room, sent))
        grid = Grid(lambda content: content)
        rounds = FederatedStrategy(parse({**CONFIG, "strategy.name": strategy, "strategy.residual": "drop"}))
        rounds.state = ServerState.start(adapter(0))
        rounds.nodes.gather(grid)
        arrays = to_arrays(flatten(rounds.state.current))
        replies = grid.send_and_receive(rounds.configure_train(1, arrays, ConfigRecord(), grid))
        taken = rounds.take_in(1, iter([replies[k] for k in order]))
        assert taken.clients == 4
        results.append((rounds.merge(1, taken, 4).state.current, list(taken.metrics), list(taken.digests.items())))
    first, *others = results
    assert all(same(first[0], state) and first[1:] == tuple(rest) for state, *rest in others)
