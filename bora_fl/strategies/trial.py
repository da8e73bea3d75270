"""A user's own strategy merges made-up rounds before a client works for it, so that its mistakes cost no training."""

import inspect
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bora_fl.blocks.gram import gram_of
from bora_fl.config import ConfigError, Settings, extensions
from bora_fl.state import AdapterState, ClientUpdate
from bora_fl.strategies.aggregation import BLOCK_METHODS, Aggregator, build
from bora_fl.strategies.layer_merge import LayerMerge
from bora_fl.strategies.made_up import drifted, factors
from bora_fl.strategies.presets import PRESETS
from bora_fl.strategies.server_state import ServerState

_LAYER, _CLIENTS, _DRIFT = "query", 3, 0.1


def tried(settings: Settings) -> Aggregator:
    """The aggregator that a run's settings describe; a strategy of a user's own has merged made-up rounds.

    Raises:
        ConfigError: As `build` does, and for a strategy that raises or returns what no client can train on, with the
            file and line.
    """
    aggregator = build(settings)
    if settings.strategy.name not in PRESETS and settings.adapter.method in BLOCK_METHODS:
        _try(aggregator)
    return aggregator


def _try(aggregator: Aggregator) -> None:
    """Merge a pass through the schedule and a round more, at the run's rank and blocks and from B = 0."""
    preset, name = aggregator.preset, aggregator.settings.name
    checked: dict[str, Any] = {
        field: _checked(rule) for field in ("merge", "prepare", "rest") if (rule := getattr(preset, field))
    }
    plain = aggregator.settings.model_copy(update={"robust": "none"})  # such rules need more clients
    aggregator = replace(aggregator, preset=replace(preset, **checked), settings=plain)
    try:
        state = ServerState.start(_start(aggregator))
        for round in range(1, len(preset.schedule) + 2):
            state = aggregator.prepare(state, round)
            updates = [_update(aggregator, state, round, client) for client in range(_CLIENTS)]
            state, _ = aggregator.aggregate(state, updates, round)
    except Exception as error:  # whatever the strategy's own code raises
        raise ConfigError(
            f"strategy.name = {name!r}: {_place(error, name, preset.merge)}: {type(error).__name__}: "
            f"{' '.join(str(error).split())}; it merged made-up adapters, before any client worked: correct it there, "
            "and check it with bora_fl.testing (docs/extending.md)"
        ) from error


def _start(aggregator: Aggregator) -> AdapterState:
    adapter, b, r = aggregator.adapter, aggregator.adapter.blocks, aggregator.adapter.rank
    layer = factors(
        torch.Generator().manual_seed(0),
        3 * b * r,
        2 * b * r,
        rank=r,
        blocks=b,
        transform=adapter.transform,
        plain=adapter.method == "lora",
        trained=False,
    )
    return AdapterState({_LAYER: layer}, {"head": torch.zeros(2, 3)})


def _update(aggregator: Aggregator, state: ServerState, round: int, client: int) -> ClientUpdate:
    generator = torch.Generator().manual_seed(100 * round + client)
    adapter, sent = aggregator.adapter, state.current.layers[_LAYER]
    plain = adapter.method == "lora"
    trained = drifted(generator, sent, aggregator.trains(round), _DRIFT, adapter.transform, plain)
    grams = {}
    if kind := aggregator.gram:
        x = torch.randn(64, sent.shape[1], generator=generator)
        grams[_LAYER] = gram_of(x, sent.num_blocks, kind) / len(x)
    tensors = {name: tensor + 1 for name, tensor in state.current.tensors.items()}
    return ClientUpdate(client, 1.0 + client, AdapterState({_LAYER: trained}, tensors), grams)


def _checked(rule: Callable[..., LayerMerge]) -> Callable[..., LayerMerge]:
    """The rule, which refuses to return what the server cannot go on from."""

    def call(layer: Any, *more: Any) -> LayerMerge:
        found = rule(layer, *more)
        if not isinstance(found, LayerMerge):
            raise TypeError(f"it returned a {type(found).__name__}, and not a LayerMerge")
        now, sent = found.current, layer.current
        if (now.shape, now.num_blocks) != (sent.shape, sent.num_blocks):
            raise ValueError(
                f"it returned factors of a weight {now.shape} in {now.num_blocks} blocks a side, where clients were "
                f"sent {sent.shape} in {sent.num_blocks}"
            )
        if now.scaling != sent.scaling:
            raise ValueError(
                f"it returned factors with scaling {now.scaling:g}, where clients were sent {sent.scaling:g}; "
                "keep it with dataclasses.replace(layer.current, B=..., sigma=..., A=...)"
            )
        if not all(bool(part.isfinite().all()) for part in (now.B, now.sigma, now.A)):
            raise ValueError("it returned factors that are not finite")
        return found

    return call


def _place(error: Exception, name: str, rule: Callable[..., LayerMerge]) -> str:
    """File, line and function of the user's own code that an error came through, else where its rule begins."""
    top = extensions.reference("strategies", name).partition(":")[0].partition(".")[0]
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if str(frame.f_globals.get("__name__")).partition(".")[0] == top:
            return f"{_short(frame.f_code.co_filename)}, line {line}, in {frame.f_code.co_name}"
    code = getattr(inspect.unwrap(rule), "__code__", None)
    return f"{_short(code.co_filename)}, line {code.co_firstlineno}, in {code.co_name}" if code else name


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file
