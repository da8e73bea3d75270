"""Find a strategy by its name: a row of the table, or a user's own."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import replace

from bora_fl.config import ConfigError, extensions, meaning
from bora_fl.strategies.presets import PRESETS, Preset


def names() -> list[str]:
    """The names that `find` takes, but for references: the table's rows, then installed entry points."""
    return list(dict.fromkeys([*PRESETS, *extensions.installed("strategies")]))


def find(name: str, key: str = "strategy.name =") -> Preset:
    """The strategy of a name.

    A user's own is a `Preset`, or a layer rule alone, which then merges whole updates and is described by its
    docstring. It never takes the name of one of the table's.

    Args:
        name: A row's name, an entry point's of the group ``bora_fl.strategies``, or ``package.module:attribute``.
        key: How a message begins: ``strategy.name =``, or an option.

    Raises:
        ConfigError: For an unknown name, with near misses, or what is no strategy.
    """
    if name in PRESETS:
        return PRESETS[name]
    if not extensions.reference("strategies", name):
        raise ConfigError(f"{key} {name!r}: no such strategy; {_hint(name)}")
    found = extensions.load("strategies", name, key)
    if isinstance(found, Preset):
        return replace(found, name=name)
    if inspect.isfunction(found):
        return _of_rule(name, found)
    raise ConfigError(
        f"{key} {name!r}: it is a {type(found).__name__}; name a Preset, or a function from LayerRound to LayerMerge"
    )


def _hint(name: str) -> str:
    if setting := meaning(name):
        return f"with any strategy, use {setting}"
    near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
    return f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(names())}"


def _of_rule(name: str, rule: Callable[..., object]) -> Preset:
    summary = (inspect.getdoc(rule) or rule.__name__).partition("\n")[0].rstrip(".")
    return Preset(name, summary, f"{rule.__module__}:{rule.__name__}", "see its source", "", rule)  # type: ignore[arg-type]
