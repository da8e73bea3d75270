"""The table, what a strategy says of itself, and what cannot be built."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bora_fl.blocks import BlockFactors
from bora_fl.config import AdapterSettings, Settings, StrategySettings
from bora_fl.state import ALL, AdapterState, ClientUpdate
from bora_fl.strategies.aggregation import build
from bora_fl.strategies.layer_merge import LayerMerge
from bora_fl.strategies.presets import PRESETS
from bora_fl.strategies.server_state import ServerState

NAMES = [
    "fedavg",
    "ffa",
    "fedsvd",
    "flora",
    "flexlora",
    "hetlora",
    "fedex",
    "lora-fair",
    "rolora",
    "fedsa",
    "fed-sb",
    "fedrot",
    "florist",
    "cellm",
    "lora-a2",
    "regmean",
    "fedrpca",
    "refactor",
    "cyclic",
]
every_name = pytest.mark.parametrize("name", NAMES)


def test_the_table_holds_these_strategies():
    assert sorted(PRESETS) == sorted(NAMES)
    assert all(row.name == name for name, row in PRESETS.items())
    assert StrategySettings().name in PRESETS


@every_name
def test_every_row_is_documented(name):
    row = PRESETS[name]
    assert len(row.summary) < 80
    assert re.search(r"arXiv:\d{4}\.\d{5}", row.source) or name == "refactor"
    assert row.equation
    assert row.differs
    pages = Path(__file__).parents[2] / "docs" / "strategies"
    assert any(f"`{name}`" in page.read_text() for page in pages.glob("*.md"))


@every_name
def test_summary_tells_in_words_what_it_takes(name, fleets):
    agg = fleets["bora exp_norm"].built(name)
    text = agg.summary()
    assert name in text
    assert PRESETS[name].source in text
    mixed = re.search(r"clients of different ranks: (yes|no, .{20,})", text)
    assert mixed
    state, updates = fleets["bora exp_norm"].round(agg, clients=3)
    f = updates[0].state.layers["query"]
    small = BlockFactors(f.B[:, :2], f.sigma[..., :2], f.A[:2], f.scaling)
    update = ClientUpdate(3, 1.0, AdapterState({"query": small}, updates[0].state.tensors))
    assert bool(agg.refuses(update, state)) == mixed.group(1).startswith("no")
    after, report = agg.aggregate(state, [update, *updates[1:]], 1)
    assert report["set_aside"] == (0 if mixed.group(1) == "yes" else 1)
    assert after.current.layers["query"].rank == 4 or name == "florist"


@every_name
def test_a_round_without_updates_changes_nothing(name, fleets):
    agg = fleets["bora exp_norm"].built(name)
    state, _ = fleets["bora exp_norm"].round(agg)
    assert agg.aggregate(state, [], 1) == (state, {"clients": 0.0, "set_aside": 0.0})


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        ({"name": "refactr"}, {}, ["'refactr'", "refactor"]),
        ({"name": "xyz"}, {}, ["'xyz'", "choose one of", "fedavg"]),
        ({"name": "fed-sb"}, {"method": "lora"}, ["adapter.method = 'lora'", "core", "bora"]),
        ({"name": "refactor"}, {"method": "vera"}, ["adapter.method = 'vera'", "fedavg or cellm"]),
        ({"name": "fedavg", "residual": "fold"}, {}, ["strategy.residual = 'fold'", "drop", "refactor"]),
        ({"name": "flora", "server_optimizer": "adam"}, {}, ["strategy.server-optimizer = 'adam'", "restart", "none"]),
        ({"name": "cyclic", "server_optimizer": "momentum"}, {}, ["coordinates", "none"]),
        ({"name": "fedavg", "server_optimizer": "yogi"}, {}, ["strategy.server-learning-rate = 1", "0.01"]),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(settings, options, words):
    with pytest.raises(ValueError, match="strategy") as caught:
        build(Settings(strategy=StrategySettings(**settings), adapter=AdapterSettings(**options)))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("method", ["dora", "gralora", "lokr", "vera", "hra", "full"])
def test_any_peft_method_can_be_averaged(method):
    adapter = AdapterSettings(method=method)
    state = ServerState.start(AdapterState({}, {"w": torch.zeros(2, 2), "steps": torch.tensor([4])}))
    updates = [
        ClientUpdate(k, w, AdapterState({}, {"w": torch.full((2, 2), w), "steps": torch.tensor([k])}))
        for k, w in enumerate((1.0, 3.0))
    ]
    for name in PRESETS:
        if PRESETS[name].no_generic:
            with pytest.raises(ValueError, match="block factors"):
                build(Settings(strategy=StrategySettings(name=name), adapter=adapter))
            continue
        after, _ = build(Settings(strategy=StrategySettings(name=name), adapter=adapter)).aggregate(state, updates, 1)
        torch.testing.assert_close(after.current.tensors["w"], torch.full((2, 2), 2.5))
        assert torch.equal(after.current.tensors["steps"], torch.tensor([1]))
    robust = StrategySettings(name="fedavg", robust="median")
    after, _ = build(Settings(strategy=robust, adapter=adapter)).aggregate(state, updates, 1)
    torch.testing.assert_close(after.current.tensors["w"], torch.full((2, 2), 3.0))


@every_name
def test_linear_strategies_need_the_weighted_mean_alone(name, fleets, dense):
    """A linear strategy gives the same state from the clients as from one client that holds their mean."""
    agg = fleets["bora exp_norm"].built(name)
    state, updates = fleets["bora exp_norm"].round(agg)
    total = sum(u.weight for u in updates)

    def mean(tensors):
        return sum(u.weight / total * t for u, t in zip(updates, tensors, strict=True))

    factors = [u.state.layers["query"] for u in updates]
    merged = BlockFactors(*(mean([getattr(f, part) for f in factors]) for part in ("B", "sigma", "A")), scaling=2.0)
    head = mean([u.state.tensors["head"] for u in updates])
    secure, _ = agg.aggregate(state, [ClientUpdate(0, total, AdapterState({"query": merged}, {"head": head}))], 1)
    plain, _ = agg.aggregate(state, updates, 1)
    if agg.linear:
        torch.testing.assert_close(secure.current.layers["query"].A, plain.current.layers["query"].A)
        assert name == "fedsa" or dense.gap(dense.model(secure), dense.model(plain)) < 1e-9
    elif name != "fedrot":  # whose components these clients have not permuted
        assert dense.gap(dense.model(secure), dense.model(plain)) > 1e-3
    for options in ({"robust": "krum"}, {"max_update_norm": 1.0}, {"min_cosine": 0.0}):
        assert not fleets["bora exp_norm"].built(name, **options).linear


def test_the_schedules():
    def trained(name, rounds, **options):
        agg = build(Settings(strategy=StrategySettings(name=name), adapter=AdapterSettings(**options)))
        return ["".join(sorted(agg.trains(r) - {"tensors"})) for r in range(1, rounds + 1)]

    assert trained("cyclic", 4) == ["B", "sigma", "A", "B"]
    assert trained("cyclic", 3, method="lora") == ["B", "A", "B"]
    assert trained("cyclic", 3, num_blocks=1) == ["B", "A", "B"]
    assert trained("rolora", 3) == ["B", "A", "B"]
    assert trained("fed-sb", 2, num_blocks=1) == ["sigma", "sigma"]
    for name in ("fedavg", "refactor", "flora"):
        assert build(Settings(strategy=StrategySettings(name=name))).trains(1) == ALL


def test_a_base_delta_before_a_round_does_not_hold_the_one_of_the_merge(fleets):
    """Clients have that one already, as the version before."""
    fed = fleets["bora exp_norm"]
    agg = fed.built("flora")
    agg = replace(agg, preset=replace(agg.preset, prepare=lambda layer: LayerMerge(layer.current, fold=extra)))
    state, updates = fed.round(fed.built("flora"), clients=2)
    extra = updates[1].state.layers["query"]
    merged, _ = agg.aggregate(state, updates, 1)
    ready = agg.prepare(merged, 2)
    assert (merged.fold_version, ready.fold_version) == (1, 2)
    torch.testing.assert_close(ready.fold["query"].dense(), extra.dense())


def test_several_layers_are_merged_each_on_its_own(fleets):
    agg = fleets["bora exp_norm"].built("flora")
    fed = fleets["bora exp_norm"]
    one, two = fed.initial(1), fed.initial(2)
    state = ServerState.start(AdapterState({"a": one.layers["query"], "b": two.layers["query"]}, one.tensors))
    other = fed.train(one, ALL, 3).layers["query"], fed.train(two, ALL, 4).layers["query"]
    update = ClientUpdate(0, 1.0, AdapterState({"a": other[0], "b": other[1]}, one.tensors))
    after, _ = agg.aggregate(state, [update], 1)
    torch.testing.assert_close(after.fold["a"].dense(), other[0].dense())
    torch.testing.assert_close(after.fold["b"].dense(), other[1].dense())
    assert not torch.equal(after.current.layers["a"].A, after.current.layers["b"].A)
