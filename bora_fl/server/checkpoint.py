"""A checkpoint after every round: tensors in safetensors, the rest in a JSON manifest, put in place in one move."""

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import bora_fl
from bora_fl.config import Scalar
from bora_fl.strategies.server_state import ServerState

log = logging.getLogger(__name__)

FORMAT = 1
# Settings that may change between a stop and its resumption: where and how long, not what is computed.
FREE = ("run.", "strategy.wait-seconds", "strategy.timeout", "strategy.min-nodes", "strategy.min-replies")
FIXED = ("run.seed",)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used."""


@dataclass(frozen=True)
class Checkpoint:
    """A run after a round: the server's state, every fold so far, the run's id."""

    round: int
    run_id: str
    state: ServerState
    folds: list[dict[str, Tensor]]


def save(folder: Path, checkpoint: Checkpoint, config: dict[str, Scalar], metrics: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint atomically and delete the oldest beyond `keep`.

    Each fold is written once, beside the checkpoints, since later checkpoints need it too.

    Returns:
        The checkpoint's folder, ``round-00007``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for version, fold in enumerate(checkpoint.folds, 1):
        path = folder / f"fold-{version:05d}.safetensors"
        if not path.is_file():
            _save_tensors(fold, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
    final = folder / f"round-{checkpoint.round:05d}"
    part = folder / f".{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    state = checkpoint.state
    _save_tensors(state.to_tensors(), part / "state.safetensors")
    manifest = {
        "format": FORMAT,
        "round": checkpoint.round,
        "run_id": checkpoint.run_id,
        "fold_version": state.fold_version,
        "num_folds": len(checkpoint.folds),
        "config": config,
        "metrics": metrics,
        "versions": {"bora_fl": bora_fl.__version__, "torch": torch.__version__},
    }
    with (part / "manifest.json").open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    for old in sorted(folder.glob("round-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_newest(folder: Path, config: dict[str, Scalar]) -> Checkpoint | None:
    """The newest whole checkpoint; a damaged one is passed over with a warning.

    Raises:
        CheckpointError: If it belongs to a run with other settings, naming them.
    """
    for path in sorted(folder.glob("round-*"), reverse=True):
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            if manifest["format"] != FORMAT:
                raise CheckpointError(f"{path} has format {manifest['format']}, this version reads {FORMAT}")
            state = ServerState.from_tensors(load_file(path / "state.safetensors"), manifest["fold_version"])
            folds = [load_file(folder / f"fold-{v:05d}.safetensors") for v in range(1, manifest["num_folds"] + 1)]
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            log.warning("passed over the damaged checkpoint %s: %s", path, error)
            continue
        _check_config(path, manifest["config"], config)
        return Checkpoint(manifest["round"], manifest["run_id"], state, folds)
    return None


def _check_config(path: Path, old: dict[str, Scalar], new: dict[str, Scalar]) -> None:
    changed = [
        f"{key} was {old.get(key)!r}, is {new[key]!r}"
        for key in new
        if old.get(key) != new[key] and (key in FIXED or not key.startswith(FREE))
    ]
    if changed:
        raise CheckpointError(
            f"{path} belongs to a run with other settings ({'; '.join(changed)}); "
            "resume with the old settings, or start anew with another run.output-dir"
        )


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
