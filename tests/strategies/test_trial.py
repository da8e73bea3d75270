"""A strategy of one's own is tried before a client works for it."""

from dataclasses import replace
from pathlib import Path

import pytest

from bora_fl.blocks import BlockFactors
from bora_fl.config import ConfigError, parse
from bora_fl.strategies import trial
from bora_fl.strategies.averaging import average
from bora_fl.strategies.base import FederatedStrategy
from bora_fl.strategies.layer_merge import LayerMerge, LayerRound
from bora_fl.strategies.presets import PRESETS, Preset
from bora_fl.strategies.trial import tried


def raising(layer: LayerRound) -> LayerMerge:
    """Raise in the middle."""
    return LayerMerge(layer.current if not layer.updates else _helper(layer))


def _helper(layer: LayerRound) -> BlockFactors:
    return layer.updates[99]


def in_a_library(layer: LayerRound) -> LayerMerge:
    """Raise below."""
    return average(replace(layer, weights=["a"]))


def nothing(layer: LayerRound) -> None:
    """Forget to return."""


def transposed(layer: LayerRound) -> LayerMerge:
    """Return another weight's factors."""
    f = layer.current
    return LayerMerge(BlockFactors(f.A.T.contiguous(), f.sigma, f.B.T.contiguous(), f.scaling))


def unscaled(layer: LayerRound) -> LayerMerge:
    """Forget the scaling."""
    f = layer.current
    return LayerMerge(BlockFactors(f.B, f.sigma, f.A))


def infinite(layer: LayerRound) -> LayerMerge:
    """Divide by the norm of B, which is zero at the start."""
    f = layer.current
    return LayerMerge(BlockFactors(f.B / f.B.norm(), f.sigma, f.A, f.scaling))


def preparing(layer: LayerRound) -> LayerMerge:
    """Raise before the second round only."""
    if layer.current.B.norm():
        raise LookupError("no such thing")
    return LayerMerge(layer.current)


whole = Preset("whole", "raise before the second round", "", "", "", average, prepare=preparing)
HERE = str(Path(__file__).relative_to(Path.cwd())) if Path(__file__).is_relative_to(Path.cwd()) else __file__


def line_of(text: str, after: str = "") -> int:
    lines = Path(__file__).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(after))
    return next(i for i, line in enumerate(lines[start:], start + 1) if text in line)


@pytest.mark.parametrize(
    ("name", "line", "function", "words"),
    [
        ("raising", line_of("updates[99]"), "_helper", "IndexError: list index out of range"),
        ("in_a_library", line_of('weights=["a"]'), "in_a_library", "Error"),
        ("nothing", line_of("def nothing"), "nothing", "TypeError: it returned a NoneType, and not a LayerMerge"),
        ("transposed", line_of("def transposed"), "transposed", "ValueError: it returned factors of a weight"),
        (
            "unscaled",
            line_of("def unscaled"),
            "unscaled",
            "ValueError: it returned factors with scaling 1, where clients",
        ),
        ("infinite", line_of("def infinite"), "infinite", "ValueError: it returned factors that are not finite"),
        ("whole", line_of("raise LookupError"), "preparing", "LookupError: no such thing"),
    ],
)
def test_a_mistake_is_named_with_file_line_and_remedy(name: str, line: int, function: str, words: str):
    settings = parse({"strategy.name": f"{__name__}:{name}"})
    with pytest.raises(ConfigError) as caught:
        tried(settings)
    message = str(caught.value)
    assert message.startswith(f"strategy.name = '{__name__}:{name}': {HERE}, line {line}, in {function}: ")
    assert words in message
    assert "docs/extending.md" in message
    assert len(message.splitlines()) == 1


def test_a_server_app_of_ones_own_tries_it_too():
    with pytest.raises(ConfigError, match=r"in _helper: IndexError"):
        FederatedStrategy(parse({"strategy.name": f"{__name__}:raising"}))


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("rank", [1, 8])
def test_every_row_of_the_table_passes_the_trial(name: str, rank: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trial, "PRESETS", {})
    tried(parse({"strategy.name": name, "adapter.rank": rank, "wire.codec": "float32"}))


def test_a_robust_rule_does_not_fail_for_the_few_made_up_clients():
    tried(parse({"strategy.name": "tests.testing.broken:halfway", "strategy.robust": "krum", "strategy.byzantine": 4}))
