"""A checkpoint after every round: tensors in safetensors, the rest in a JSON manifest, put in place in one move.

The manifest holds the SHA-256 digest of every file that the checkpoint needs and of the manifest itself, and every
tensor must be finite: what has been damaged on the disk is found before it is used.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from safetensors.torch import save as serialize
from torch import Tensor

import bora_fl
from bora_fl.config import Scalar, Settings
from bora_fl.paths import atomically, delete, digest, path_part, write_atomically
from bora_fl.strategies.server_state import ServerState

log = logging.getLogger(__name__)

FORMAT = 2
"""Format 1 is the same without digests; it is read too."""
STATE, MANIFEST = "state.safetensors", "manifest.json"
# Settings that may change between a stop and its resumption: where and how long, not what is computed.
FREE = ("run.", "strategy.wait-seconds", "strategy.timeout", "strategy.min-nodes", "strategy.min-replies")
FIXED = ("run.seed",)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used."""


@dataclass(frozen=True)
class Checkpoint:
    """A run after a round.

    Attributes:
        round: The round.
        run_id: The run's.
        state: The server's.
        folds: Every one so far.
        data: Names the content of the server's data, as `source_fingerprint` does; empty where it is not known.
    """

    round: int
    run_id: str
    state: ServerState
    folds: list[dict[str, Tensor]]
    data: str = ""


class _Manifest(BaseModel):
    """What of the manifest is needed to go on from a checkpoint."""

    model_config = ConfigDict(strict=True)

    format: int = Field(ge=1)
    round: int = Field(ge=0)
    run_id: str
    fold_version: int = Field(ge=0)
    num_folds: int = Field(ge=0)
    config: dict[str, Scalar]
    sha256: dict[str, str] = Field(default_factory=dict)
    data: str = ""


def save(folder: Path, checkpoint: Checkpoint, config: dict[str, Scalar], metrics: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint atomically and delete the oldest beyond `keep`.

    Each fold is written once, beside the checkpoints, since later checkpoints need it too.

    Returns:
        The checkpoint's folder, ``round-00007``.

    Raises:
        CheckpointError: If a tensor is not finite; nothing is written, and the older checkpoints stand.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    for left in [*folder.glob(".round-*.part"), *folder.glob(".round-*.old")]:  # by a process that was killed
        delete(left)
    state = checkpoint.state
    tensors = state.to_tensors()
    try:
        _require_finite(tensors)
        digests = _write_folds(folder, checkpoint)
    except ValueError as error:
        raise CheckpointError(
            f"round {checkpoint.round} is not written to {folder}: {error}. Lower the learning rate of the clients or "
            "of the server, then go on from the last checkpoint with run.resume=true, or start anew"
        ) from error
    final = folder / f"round-{checkpoint.round:05d}"
    with atomically(final) as part:
        part.mkdir(mode=0o700)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part / STATE)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "round": checkpoint.round,
            "run_id": checkpoint.run_id,
            "data": checkpoint.data,
            "fold_version": state.fold_version,
            "num_folds": len(checkpoint.folds),
            "config": config,
            "metrics": metrics,
            "versions": {"bora_fl": bora_fl.__version__, "torch": torch.__version__},
            "sha256": {STATE: digest(part / STATE), **digests},
        }
        manifest["digest"] = _digest_of(manifest)
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for file in part.iterdir():
            file.chmod(0o600)
    earlier = [path for path in sorted(folder.glob("round-*")) if path.name <= final.name]
    for path in earlier[:-keep]:
        delete(path)
    return final


def load_newest(folder: Path, config: dict[str, Scalar]) -> Checkpoint | None:
    """The newest whole checkpoint; a damaged one is passed over with a warning. None where there is no checkpoint.

    Raises:
        CheckpointError: If it belongs to a run with other settings, naming them, or if no checkpoint is whole.
    """
    damaged = []
    for path in sorted(folder.glob("round-*"), reverse=True):
        try:
            manifest, checkpoint = _load(path)
        except CheckpointError:
            raise
        except (OSError, KeyError, ValueError, TypeError, RuntimeError, RecursionError, SafetensorError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            log.warning("passed over the damaged checkpoint %s: %s", path, reason)
            damaged.append(f"{path}: {reason}")
            continue
        _check_config(path, manifest.config, config)
        return checkpoint
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {folder} is whole ({'; '.join(damaged)}): restore that folder from a backup and resume, "
            "or start anew with another run.output-dir. Nothing was deleted"
        )
    return None


def load_round(folder: Path, round: int) -> Checkpoint:
    """The checkpoint of a round, whatever its settings.

    Raises:
        CheckpointError: If it is not there, or damaged.
    """
    path = folder / f"round-{round:05d}"
    try:
        return _load(path)[1]
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, RecursionError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the checkpoint {path} cannot be read: {error}") from error


def _read_manifest(path: Path) -> _Manifest:
    """The manifest of a checkpoint's folder, checked.

    Raises:
        ValueError: If it is damaged.
        CheckpointError: If a later version of this package wrote it.
    """
    content = json.loads((path / MANIFEST).read_bytes())
    manifest = _Manifest.model_validate(content)
    if (manifest.format > 1 or "digest" in content) and content.pop("digest", "") != _digest_of(content):
        raise ValueError(f"{MANIFEST} is not as it was written")
    if manifest.format > FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest.format}, this version reads 1 to {FORMAT}; install the bora-fl that wrote it"
        )
    if f"round-{manifest.round:05d}" != path.name:
        raise ValueError(f"{MANIFEST} is that of round {manifest.round}")
    path_part(manifest.run_id)
    return manifest


def _load(path: Path) -> tuple[_Manifest, Checkpoint]:
    manifest = _read_manifest(path)

    def read(file: Path) -> dict[str, Tensor]:
        if manifest.format > 1 and digest(file) != manifest.sha256[file.name]:
            raise ValueError(f"{file.name} is not as it was written")
        tensors: dict[str, Tensor] = load_file(file)
        _require_finite(tensors, f" of {file.name}")
        return tensors

    tensors = read(path / STATE)
    folds = [read(_fold_path(path.parent, version)) for version in range(1, manifest.num_folds + 1)]
    state = ServerState.from_tensors(tensors, manifest.fold_version)
    return manifest, Checkpoint(manifest.round, manifest.run_id, state, folds, manifest.data)


def _write_folds(folder: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """Write the folds that the round before did not have yet; returns every fold's file name and digest.

    A file of the same version may be there from rounds that a resumed run does again: it is replaced.
    """
    known: dict[str, str] = {}
    try:
        before = _read_manifest(folder / f"round-{checkpoint.round - 1:05d}")
        known = before.sha256 if before.run_id == checkpoint.run_id else {}
    except (OSError, ValueError):
        if checkpoint.folds:
            log.info("round %d: every base delta is written or compared anew", checkpoint.round)
    digests = {}
    for version, fold in enumerate(checkpoint.folds, 1):
        path = _fold_path(folder, version)
        if path.name not in known or not path.is_file():
            _require_finite(fold, f" of fold {version}")
            data = serialize({name: tensor.contiguous() for name, tensor in fold.items()})
            known[path.name] = hashlib.sha256(data).hexdigest()
            if not path.is_file() or digest(path) != known[path.name]:
                write_atomically(path, data, mode=0o600)
        digests[path.name] = known[path.name]
    return digests


def _fold_path(folder: Path, version: int) -> Path:
    return folder / f"fold-{version:05d}.safetensors"


def _digest_of(manifest: Mapping[str, Any]) -> str:
    as_read = json.loads(json.dumps(manifest))  # keys are strings from here on, which sort in another way
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def _require_finite(tensors: Mapping[str, Tensor], where: str = "") -> None:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}{where} is not finite")


def _check_config(path: Path, old: dict[str, Scalar], new: dict[str, Scalar]) -> None:
    """Refuse to go on under other settings; one that an earlier version did not have was at its default."""
    before = Settings().flat() | old
    changed = [
        f"{key} was {before.get(key)!r}, is {new[key]!r}"
        for key in new
        if before.get(key) != new[key] and (key in FIXED or not key.startswith(FREE))
    ]
    if changed:
        raise CheckpointError(
            f"{path} belongs to a run with other settings ({'; '.join(changed)}); "
            "resume with the old settings, or start anew with another run.output-dir"
        )
