"""A user's own strategies, data, models and sinks: named by an entry point, or as ``package.module:attribute``.

An entry point's name works wherever its package is installed. A reference works wherever the module can be imported,
the working folder included, and goes with a run's bundle (`deployment.flower_app`).
"""

import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from bora_fl.config.groups import ConfigError, Scalar

Kind = Literal["strategies", "data", "models", "sinks"]
SETTINGS: dict[str, Kind] = {
    "strategy.name": "strategies",
    "data.name": "data",
    "model.name": "models",
    "run.sinks": "sinks",
}
"""The settings that take an extension's name, or several with commas, and the kind."""

_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_installed_only = False


def installed(kind: Kind) -> dict[str, str]:
    """Names of the entry points of the group ``bora_fl.<kind>``, each with its reference."""
    return {point.name: point.value for point in sorted(entry_points(group=f"bora_fl.{kind}"), key=lambda p: p.name)}


def reference(kind: Kind, name: str) -> str:
    """What a name refers to, as ``package.module:attribute``; empty if it names no extension."""
    if _REFERENCE.fullmatch(name) and not name.startswith("embedded:"):
        return name
    return installed(kind).get(name, "")


def load(kind: Kind, name: str, key: str) -> Any:
    """Import an extension.

    Args:
        kind: What it is.
        name: An entry point's name, or a reference.
        key: How a message begins: ``strategy.name =``, or an option.

    Raises:
        ConfigError: If it cannot be imported, or this process takes what is installed alone.
    """
    if _installed_only and name not in installed(kind):
        raise ConfigError(
            f"{key} {name!r}: this process imports no code that a run names; install the package with an entry point "
            f"of the group bora_fl.{kind}, and give its name"
        )
    module, _, attribute = reference(kind, name).partition(":")
    _find_in_working_folder()
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the module's own code raises
        raise ConfigError(
            f"{key} {name!r}: {attribute!r} cannot be imported from {module!r} ({type(error).__name__}: {error}); "
            "name package.module:attribute of an installed package or of a module in the working folder"
        ) from error


def _names(run_config: Mapping[str, Scalar], key: str) -> list[str]:
    return [name.strip() for name in str(run_config.get(key, "")).split(",") if name.strip()]


def _find_in_working_folder() -> None:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that a file there hides no library


def take_installed_only() -> None:
    """From now on this process imports no module that a run's settings name, but for installed entry points."""
    global _installed_only
    _installed_only = True


def portable(run_config: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """A run config with references for the names of entry points, which a bundle does not carry."""
    found = {
        key: ",".join(reference(kind, name) or name for name in _names(run_config, key))
        for key, kind in SETTINGS.items()
        if key in run_config
    }
    return dict(run_config) | found


def sources(run_config: Mapping[str, Scalar]) -> list[Path]:
    """The packages' folders and modules' files that a run config's references need, bora_fl's own left out."""
    paths = []
    named = [(key, kind, name) for key, kind in SETTINGS.items() for name in _names(run_config, key)]
    for key, kind, name in named:
        top = reference(kind, name).partition(":")[0].partition(".")[0]
        if not top or top == "bora_fl":
            continue
        _find_in_working_folder()
        spec = importlib.util.find_spec(top)
        if spec is None or spec.origin is None:
            raise ConfigError(f"{key} = {name!r}: there is no package {top!r} with code to send")
        origin = Path(spec.origin)
        paths.append(origin.parent if origin.name == "__init__.py" else origin)
    return list(dict.fromkeys(paths))


def code_digest(run_config: Mapping[str, Scalar]) -> str:
    """SHA-256 of the code that a run config's references need; empty without any."""
    files = [
        file for path in sources(run_config) for file in ([path] if path.is_file() else sorted(path.rglob("*.py")))
    ]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest() if files else ""
