"""The Flower app that a run executes: a folder's own, or the installed package where the folder has none."""

import json
import os
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

import bora_fl
from bora_fl.config import ConfigError, Settings

TABLE = {"publisher": "bora-fl", "fab-format-version": 1, "flwr-version-target": "1.41.0"}
COMPONENTS = {"serverapp": "bora_fl.server.app:app", "clientapp": "bora_fl.client.app:app"}
_PACKAGE = Path(bora_fl.__file__).resolve().parent
_BESIDE = ("kernels", "simulations")  # in a wheel they stand in the package


def app_table(app: Path) -> dict[str, Any]:
    """The table ``[tool.flwr.app]`` of a folder's pyproject.toml; empty for the installed package.

    Raises:
        ConfigError: If the folder has none and is not the working directory.
    """
    path = app / "pyproject.toml"
    table: dict[str, Any] = {}
    if path.is_file():
        table = tomllib.loads(path.read_text()).get("tool", {}).get("flwr", {}).get("app", {})
    if not table and app.resolve() != Path.cwd():
        raise ConfigError(f"--app {app}: there is no pyproject.toml with [tool.flwr.app]; name a checkout or a bundle")
    return table


def stage(app: Path, into: Path, extensions: Sequence[Path] = ()) -> Path:
    """A copy of what a bundle takes of an app, or of the installed package.

    Flower matches every file below the app's folder against its ignore rules, an environment's fifty thousand included,
    which takes longer than the rest of the start.

    Args:
        app: A checkout or an unpacked bundle; the working directory may be none.
        into: Folder to put the copy in.
        extensions: Folders of packages, and files of modules, that go with it.

    Raises:
        ConfigError: As `app_table` does.
    """
    target = into / "app"
    for path in extensions:
        _copy(path, target / path.name)
    if app_table(app):
        _copy(app, target)
        return target
    _copy(_PACKAGE, target / "bora_fl")
    for name in _BESIDE:
        if not (_PACKAGE / name).is_dir():
            _copy(_PACKAGE.parent / name, target / "bora_fl" / name)
    (target / "LICENSE").write_text(_licence())
    (target / "pyproject.toml").write_text("".join(f"{line}\n" for line in _project()))
    return target


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    for folder, folders, files in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        for name in files:
            if name == "LICENSE" or name.endswith((".py", ".toml", ".md")):
                path = target / Path(folder).relative_to(source) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(folder) / name, path)


def _project() -> Iterator[str]:
    """The lines of a pyproject.toml for the installed package."""
    needs = [text for text in metadata.requires("bora-fl") or [] if not _is_extra(text)]
    yield "[project]"
    yield 'name = "bora-fl"'
    yield f"version = {json.dumps(bora_fl.__version__)}"
    yield 'license = { file = "LICENSE" }'
    yield f"dependencies = {json.dumps(needs)}"
    yield from ("", "[tool.flwr.app]", *(f"{key} = {json.dumps(value)}" for key, value in TABLE.items()))
    yield from ("", "[tool.flwr.app.components]")
    yield from (f"{key} = {json.dumps(value)}" for key, value in COMPONENTS.items())
    for group, keys in Settings().model_dump(by_alias=True).items():
        yield from ("", f"[tool.flwr.app.config.{group}]")
        yield from (f"{key} = {json.dumps(value)}" for key, value in keys.items())


def _is_extra(requirement: str) -> bool:
    return "extra ==" in str(Requirement(requirement).marker or "")


def _licence() -> str:
    """The licence's text, as the installed distribution carries it."""
    for file in metadata.files("bora-fl") or []:
        if file.name == "LICENSE" and "dist-info" in str(file):
            return file.read_text()
    return (_PACKAGE.parent / "LICENSE").read_text()
