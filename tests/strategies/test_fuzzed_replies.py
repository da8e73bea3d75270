"""Malformed replies, drawn over the records: the server's state is bit for bit that of a run without them."""

import pickle
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bora_fl.config import parse
from bora_fl.report import RoundReport
from bora_fl.strategies.aggregation import build
from bora_fl.strategies.base import FederatedStrategy
from bora_fl.strategies.observer import Observer
from bora_fl.strategies.server_state import ServerState
from bora_fl.wire.records import PACKED, from_arrays, to_arrays
from bora_fl.wire.schema import METRICS, REPLY, SCHEMA, STATE
from tests.strategies.four_nodes import CONFIG, Garble, Grid, adapter


class Silent(Observer):
    def on_start(self, num_partitions: int) -> None: ...
    def evaluate(self, *_: object) -> None: ...
    def held_out_loss(self, *_: object) -> float:
        raise AssertionError

    def on_round(self, report: RoundReport, *_: object) -> None:
        self.report = report


def run(garble: Garble) -> tuple[dict[str, torch.Tensor], RoundReport]:
    options, observer = parse(CONFIG), Silent()
    strategy = FederatedStrategy(options, build(options), "run", observer)
    state = strategy.run(Grid(garble), ServerState.start(adapter(0)), [], 1)
    carried = {f"carried/{name}": factors.dense() for name, factors in state.carried.items()}
    return state.to_tensors() | carried, observer.report


def absent(content: RecordDict) -> Error:
    return Error(code=20, reason="gone")


# --- ways to break a reply -------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.integers(-(2**62), 2**62),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=20),
    st.booleans(),
    st.lists(st.integers(-5, 5), max_size=3),
)
BAD_NUMBERS = st.sampled_from([float("nan"), float("inf"), float("-inf"), [1.0, 2.0], []])
BAD_WEIGHTS = st.one_of(BAD_NUMBERS, st.floats(max_value=0), st.integers(-(2**62), 0), st.just(1e300))


@st.composite
def records(draw: st.DrawFn) -> Garble:
    """Records that have nothing to do with the schema."""
    drawn: dict[str, Any] = {}
    for name in draw(st.lists(st.sampled_from([STATE, REPLY, METRICS, "x", ""]), max_size=4, unique=True)):
        kind = draw(st.sampled_from(["config", "metric", "array"]))
        keys = draw(st.lists(st.text(max_size=8), max_size=3, unique=True))
        if kind == "config":
            drawn[name] = ConfigRecord({key: draw(SCALARS) for key in keys})
        elif kind == "metric":
            drawn[name] = MetricRecord({key: draw(st.floats() | st.integers(-(2**62), 2**62)) for key in keys})
        else:
            drawn[name] = ArrayRecord({key: _array(draw(st.binary(max_size=64))) for key in keys})
    return lambda content: RecordDict(drawn)


@st.composite
def without(draw: st.DrawFn) -> Garble:
    """A record that is missing, or another kind of record in its place."""
    name, other = draw(st.sampled_from([STATE, REPLY, METRICS])), draw(st.sampled_from([None, "config", "array"]))

    def garble(content: RecordDict) -> RecordDict:
        kept = {key: record for key, record in content.items() if key != name}
        if other == "config" and name != REPLY:
            kept[name] = ConfigRecord({"round": 1})
        if other == "array" and name != STATE:
            kept[name] = ArrayRecord({})
        kept.pop(METRICS, None) if STATE not in content else None
        return RecordDict(kept)

    return garble


@st.composite
def wrong_reply(draw: st.DrawFn) -> Garble:
    """Another schema, another round, a refusal, of any type."""
    key = draw(st.sampled_from(["schema", "round", "refused"]))
    value = draw(SCALARS.filter(lambda v: v not in (1, 2)))

    def garble(content: RecordDict) -> RecordDict:
        content[REPLY] = ConfigRecord({"schema": SCHEMA, "round": 1, key: value})
        content.pop(METRICS) if STATE not in content else None
        return content

    return garble


@st.composite
def wrong_metrics(draw: st.DrawFn) -> Garble:
    """Numbers that are none, weights that are none, a flood of names."""
    flood = draw(st.booleans())
    weight, number = draw(BAD_WEIGHTS), draw(BAD_NUMBERS)

    def garble(content: RecordDict) -> RecordDict:
        metrics = content.metric_records[METRICS]
        if "num-examples" in metrics:
            metrics["num-examples"] = weight
        else:
            metrics["eval-loss"] = number
        if flood:
            for i in range(500):
                metrics[f"m{i}"] = i
        return content

    return garble


@st.composite
def wrong_arrays(draw: st.DrawFn) -> Garble:
    """Entries that are missing, unknown, of a wrong shape, dtype or value, or bytes that are no array."""
    ways = ["drop", "add", "shape", "dtype", "value", "cut", "header", "pickle", "bytes", "entries", "sign"]
    way = draw(st.sampled_from(ways))
    place, cut = draw(st.integers(0, 10)), draw(st.integers(0, 200))
    shape = draw(st.lists(st.integers(0, 7), max_size=4))
    bad = draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
    noise = draw(st.binary(max_size=200))

    def garble(content: RecordDict) -> Any:
        if STATE not in content:
            return RecordDict({METRICS: MetricRecord({"eval-loss": float("nan")})})
        flat = from_arrays(content.array_records[STATE])
        packed = content.array_records[STATE][PACKED].data
        names = sorted(flat)
        name = names[place % len(names)]
        tensor = flat[name]
        if way == "drop":
            del flat[name]
        elif way == "add":
            flat[f"{name}x"] = flat[name]
        elif way == "shape":
            flat[name] = torch.zeros([*shape, 11])
        elif way == "dtype":
            flat[name] = tensor.to(torch.float64 if tensor.dtype == torch.float32 else torch.float32)
        elif way == "value":
            flat[name] = torch.full_like(tensor, bad)
        elif way == "sign":
            flat |= {n: -t for n, t in flat.items() if n.endswith("/sigma")}
        if way == "cut":
            packed = packed[: min(cut, len(packed) - 1)]
        elif way == "header":
            packed = packed.replace(b'"shape":[', b'"shape":[9999999,')
        elif way == "pickle":
            packed = pickle.dumps(flat)
        elif way == "bytes":
            packed = noise
        else:
            packed = to_arrays(flat)[PACKED].data
        if way == "entries":
            content.array_records[STATE] = ArrayRecord({n: Array(t.numpy()) for n, t in flat.items()})
        else:
            content.array_records[STATE] = ArrayRecord({PACKED: _array(packed)})
        return content

    return garble


def _array(data: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(data),), stype=PACKED, data=data)


@pytest.fixture(scope="module")
def healthy() -> dict[str, torch.Tensor]:
    return run(absent)[0]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(garble=st.one_of(records(), without(), wrong_reply(), wrong_metrics(), wrong_arrays()))
def test_a_malformed_reply_leaves_no_trace(healthy: dict[str, torch.Tensor], garble: Garble):
    state, report = run(garble)
    assert state.keys() == healthy.keys()
    assert all(torch.equal(state[name], healthy[name]) for name in healthy)
    assert report.clients == 3
    assert report.rejected >= 1
    assert report.client_loss == pytest.approx(2.0)


@pytest.mark.parametrize(
    "lie",
    [{"train-loss": 1e300}, {"eval-loss": -1.0}, {"eval-loss": 1e31}, {"eval-accuracy": 1.5}, {"eval-examples": -3.0}],
)
def test_numbers_beyond_any_meaning_are_rejected(healthy: dict[str, torch.Tensor], lie: dict[str, float]):
    def garble(content: RecordDict) -> RecordDict:
        content.metric_records[METRICS].update(lie)
        return content

    state, report = run(garble)
    assert all(torch.equal(state[name], healthy[name]) for name in healthy)
    assert report.clients == 3


def test_a_good_reply_does_leave_one(healthy: dict[str, torch.Tensor]):
    state, report = run(lambda content: content)
    head = "current/tensors/head.weight"
    assert not torch.equal(state[head], healthy[head])
    assert report.rejected == 0
