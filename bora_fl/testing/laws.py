"""What must hold of every strategy, whatever it merges: a table of laws, and a check of one of them.

A law that does not hold of a strategy by design, such as one that goes half of the way to the clients' mean, is left
out in that strategy's own test.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch

from bora_fl.adapters.sigma import to_raw
from bora_fl.state import ClientUpdate, flatten
from bora_fl.strategies.aggregation import Aggregator
from bora_fl.strategies.server_state import ServerState
from bora_fl.testing.fleets import FLEETS, gap, mean_product, model

TOLERANCE = 1e-6  # relative, float64
_ROUNDING = 5e-6  # the same, float32


class Merged(NamedTuple):
    """A round: the prepared state, the clients' updates, and what was made of them."""

    state: ServerState
    updates: list[ClientUpdate]
    after: ServerState
    report: dict[str, float]


class Case:
    """A strategy on a fleet; a round is merged once, for all laws.

    Args:
        strategy: As for ``strategy.name``.
        fleet: One of `FLEETS`.
    """

    def __init__(self, strategy: str, fleet: str) -> None:
        self.strategy, self.fleet = strategy, replace(FLEETS[fleet])
        self._merged: dict[tuple[int, int], Merged] = {}

    @cached_property
    def aggregator(self) -> Aggregator:
        """The strategy's; at a threshold of 1 a truncation by energy keeps every component."""
        return self.fleet.built(self.strategy, threshold=1.0, sweeps=5)

    @property
    def rounds(self) -> range:
        """The rounds of one pass through the schedule."""
        return range(1, len(self.aggregator.preset.schedule) + 1)

    @property
    def personal(self) -> bool:
        """Whether clients keep B and Sigma, so that no product of the server's means anything."""
        return not self.aggregator.shares() & {"B", "sigma"}

    def merged(self, round: int = 1, clients: int = 4) -> Merged:
        """A round of clients with weights 1, 2, …"""
        if (round, clients) not in self._merged:
            state, updates = self.fleet.round(self.aggregator, clients, round)
            self._merged[round, clients] = Merged(state, updates, *self.aggregator.aggregate(state, updates, round))
        return self._merged[round, clients]

    def same(self, found: ServerState, wanted: ServerState) -> None:
        """Require two states to be the same model; of a personal strategy, what is shared of it."""
        if self.personal:
            for layer, f in wanted.current.layers.items():
                torch.testing.assert_close(found.current.layers[layer].A, f.A)
        else:
            _close(gap(model(found), model(wanted)))


def one_client_is_a_no_op(case: Case) -> None:
    """A round with a single client ends in that client's product and head."""
    for round in case.rounds:
        _, updates, after, report = case.merged(round, clients=1)
        torch.testing.assert_close(after.current.tensors["head"], updates[0].state.tensors["head"])
        if case.personal:
            torch.testing.assert_close(after.current.layers["query"].A, updates[0].state.layers["query"].A)
        else:
            _close(gap(model(after), mean_product(updates)))
            _close(report["merge_error"])


def identical_clients_are_a_no_op(case: Case) -> None:
    """Clients that return the same are merged into what one of them is merged into."""
    for round in case.rounds:
        state, (only,), alone, _ = case.merged(round, clients=1)
        twins = [replace(only, client=k, weight=w) for k, w in enumerate((1.0, 5.0, 2.5))]
        case.same(case.aggregator.aggregate(state, twins, round)[0], alone)


def the_order_of_clients_does_not_matter(case: Case) -> None:
    """Bit for bit."""
    state, updates, first, _ = case.merged()
    second, _ = case.aggregator.aggregate(state, [updates[k] for k in (2, 0, 3, 1)], 1)
    a, b = flatten(first.current), flatten(second.current)
    _require(all(torch.equal(a[key], b[key]) for key in a), "another order gives other factors")
    _require(first.fold.keys() == second.fold.keys(), "another order gives another base delta")


def only_the_ratio_of_weights_matters(case: Case) -> None:
    """All weights times seven change nothing."""
    state, updates, first, _ = case.merged()
    heavier = [replace(u, weight=7 * u.weight) for u in updates]
    case.same(case.aggregator.aggregate(state, heavier, 1)[0], first)


def weights_are_not_ignored(case: Case) -> None:
    """One client of weight 100 among others of 1 shows."""
    state, updates, first, _ = case.merged()
    skewed = [replace(u, weight=w) for u, w in zip(updates, (100.0, 1.0, 1.0, 1.0), strict=True)]
    a, b = (
        flatten(found.current) | {f"fold/{n}": f.dense() for n, f in found.fold.items()}
        for found in (first, case.aggregator.aggregate(state, skewed, 1)[0])
    )
    moved = [key for key in a if not key.startswith("tensors/") and not torch.allclose(a[key], b[key], rtol=1e-3)]
    _require(bool(moved), "a weight of 100 among weights of 1 changes no factor")


def a_client_of_tiny_weight_changes_next_to_nothing(case: Case) -> None:
    """However far it has moved."""
    state, updates, without, _ = case.merged()
    agg, fleet = case.aggregator, case.fleet
    trained = fleet.train(state.current, agg.trains(1), 77, size=3.0)
    far = ClientUpdate(99, 1e-10, trained, fleet.grams(agg.gram, 77))
    case.same(agg.aggregate(state, [*updates, far], 1)[0], without)


def an_exact_strategy_reproduces_the_mean_product(case: Case) -> None:
    """If it says that it is `exact`."""
    if case.aggregator.preset.exact:
        for round in case.rounds:
            _, updates, after, report = case.merged(round)
            _close(gap(model(after), mean_product(updates)))
            _close(report["merge_error"])


def the_report_measures_the_distance_to_the_mean_product(case: Case) -> None:
    """Against dense matrices."""
    state, updates, after, report = case.merged()
    _require((report["clients"], report["set_aside"]) == (4, 0), f"not four clients were merged: {report}")
    if case.personal:
        _require("merge_error" not in report, "there is no product to be off from, and yet a merge_error")
        return
    found, wanted = model(after), mean_product(updates)
    error = sum(float((found[n] - wanted[n]).square().sum()) for n in wanted) ** 0.5
    target = sum(float(wanted[n].square().sum()) for n in wanted) ** 0.5
    moved = sum(float((wanted[n] - f.dense()).square().sum()) for n, f in state.current.layers.items()) ** 0.5
    _close(abs(report["merge_error"] - error / target))
    _close(abs(report["update_norm"] / moved - 1))


def the_adapter_keeps_its_form(case: Case) -> None:
    """Shapes, rank, dtype and scaling stay, and its Sigma can be trained on."""
    for round in case.rounds:
        state, _, after, _ = case.merged(round)
        after = case.aggregator.prepare(after, round + 1)
        for layer, f in after.current.layers.items():
            before, parts = state.current.layers[layer], (f.B, f.sigma, f.A)
            for name in ("shape", "num_blocks", "scaling", "rank"):
                was, now = getattr(before, name), getattr(f, name)
                _require(now == was, f"{name} of layer {layer} is {now} and was {was}")
            _require({t.dtype for t in parts} == {torch.float64}, f"dtypes are {[t.dtype for t in parts]}")
            _require(all(bool(t.isfinite().all()) for t in parts), "a factor is not finite")
            to_raw(f.sigma, case.aggregator.adapter.transform)  # raises where the transform cannot reach Sigma
            _require(not case.fleet.plain or bool((f.sigma == 1).all()), "plain LoRA's Sigma is not 1 any more")


def inputs_are_left_alone(case: Case) -> None:
    """Merging changes neither the state nor the updates in place."""
    state, updates = case.fleet.round(case.aggregator)
    given = [flatten(state.current), *(flatten(update.state) for update in updates)]
    copies = [{key: tensor.clone() for key, tensor in flat.items()} for flat in given]
    case.aggregator.aggregate(state, updates, 1)
    for before, now in zip(copies, given, strict=True):
        _require(all(torch.equal(before[key], tensor) for key, tensor in now.items()), "an input was changed")


def preparing_does_not_change_the_model(case: Case) -> None:
    """And preparing twice is preparing once; at the start, where B = 0, and later."""
    for trained in (False, True):
        start = ServerState.start(case.fleet.initial(trained=trained))
        for round in case.rounds:
            ready = case.aggregator.prepare(start, round)
            again = case.aggregator.prepare(ready, round)
            for state in (ready, again):
                for layer, update in model(state).items():
                    torch.testing.assert_close(update, start.current.layers[layer].dense(), rtol=1e-9, atol=1e-10)
            _require(again.fold_version == ready.fold_version == bool(ready.fold), "the base delta's version is off")


def a_second_round_goes_on_from_the_first(case: Case) -> None:
    """From B = 0, with the base delta's version counted."""
    agg, fleet = case.aggregator, case.fleet
    state, updates = fleet.round(agg, trained=False)
    state, _ = agg.aggregate(state, updates, 1)
    version = state.fold_version
    _require(version == agg.preset.folds, f"`folds` is {agg.preset.folds}, and the base delta's version {version}")
    state = agg.prepare(state, 2)
    trained = [fleet.train(state.current, agg.trains(2), 50 + k) for k in range(3)]
    updates = [ClientUpdate(k, 1.0, theirs, fleet.grams(agg.gram, 50 + k)) for k, theirs in enumerate(trained)]
    after, _ = agg.aggregate(state, updates, 2)
    _require(after.fold_version == version + bool(after.fold), "the base delta's version is off")
    if agg.preset.exact:
        _close(gap(model(after), mean_product(updates)))


def float32_stays_float32(case: Case) -> None:
    """And an exact strategy is exact to its rounding."""
    fleet = replace(case.fleet, dtype=torch.float32)
    state, updates = fleet.round(case.aggregator)
    after, _ = case.aggregator.aggregate(state, updates, 1)
    factors = after.current.layers["query"]
    dtypes = {t.dtype for t in (factors.B, factors.sigma, factors.A)}
    _require(dtypes == {torch.float32}, f"dtypes are {dtypes}")
    if case.aggregator.preset.exact:
        _close(gap(model(after), mean_product(updates)), _ROUNDING)


LAWS: dict[str, Callable[[Case], None]] = {
    law.__name__: law
    for law in (
        one_client_is_a_no_op,
        identical_clients_are_a_no_op,
        the_order_of_clients_does_not_matter,
        only_the_ratio_of_weights_matters,
        weights_are_not_ignored,
        a_client_of_tiny_weight_changes_next_to_nothing,
        an_exact_strategy_reproduces_the_mean_product,
        the_report_measures_the_distance_to_the_mean_product,
        the_adapter_keeps_its_form,
        inputs_are_left_alone,
        preparing_does_not_change_the_model,
        a_second_round_goes_on_from_the_first,
        float32_stays_float32,
    )
}
"""Every law by its name."""


def check(strategy: str, law: str, fleets: Collection[str] = tuple(FLEETS)) -> None:
    """Check a law of a strategy, on fleets that it can run on.

    Args:
        strategy: As for ``strategy.name``: also an entry point's name, or ``package.module:attribute``.
        law: One of `LAWS`.
        fleets: Names of `FLEETS`.

    Raises:
        AssertionError: If it does not hold, with the fleet.
        ConfigError: If there is no such strategy.
    """
    for fleet in fleets:
        case = _case(strategy, fleet)
        if FLEETS[fleet].plain and _case(strategy, "bora exp_norm").aggregator.preset.no_lora:
            continue
        try:
            LAWS[law](case)
        except AssertionError as error:
            raise AssertionError(f"{strategy} on {fleet}: {law.replace('_', ' ')}: {error}") from error


@lru_cache(maxsize=len(FLEETS))
def _case(strategy: str, fleet: str) -> Case:
    return Case(strategy, fleet)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def _close(error: float, tolerance: float = TOLERANCE) -> None:
    _require(error < tolerance, f"off by {error:.2g}, relative, where {tolerance:g} is the most")
