"""Environments with the wheel, what it requires, and nothing else."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import weakref
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def build(folder: Path) -> Path:
    """The wheel of this checkout."""
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--wheel-dir", str(folder), "--quiet"]
    subprocess.run(command, check=True)
    (file,) = folder.glob("*.whl")
    return file


def linked(folder: Path, wheel: Path, *extras: str) -> Path:
    """An environment without the index: the wheel, and links to those packages here that it requires.

    Args:
        folder: Where it will be.
        wheel: See `build`.
        extras: Extras of the wheel.

    Returns:
        Its Python, with ``bora-fl`` beside it.
    """
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet", str(wheel)]
    subprocess.run(command, check=True)
    (ours,) = distributions(path=[str(site)])
    tops = Counter(top for other in distributions() for top in {file.parts[0] for file in other.files or ()})
    for distribution in requirements(ours, set(extras)):
        for file in distribution.files or ():
            # A folder of several packages is no link, so that the others' parts of it stay away.
            link = Path(file) if tops[file.parts[0]] > 1 else Path(file.parts[0])
            if file.parts[0] != ".." and not (site / link).exists():
                (site / link).parent.mkdir(parents=True, exist_ok=True)
                (site / link).symlink_to(distribution.locate_file(str(link)))
    return python


def requirements(distribution: Distribution, extras: set[str]) -> Iterator[Distribution]:
    """All that a distribution needs, as it is installed here."""
    todo, seen = [(distribution, extra) for extra in {"", *extras}], set()
    while todo:
        at, extra = todo.pop()
        for row in map(Requirement, at.requires or ()):
            if row.marker and not row.marker.evaluate({"extra": extra}):
                continue
            needed = importlib.metadata.distribution(row.name)
            for wanted in {"", *row.extras}:
                if (key := (canonicalize_name(row.name), wanted)) not in seen:
                    seen.add(key)
                    todo.append((needed, wanted))
                    yield needed


class User:
    """Somebody who types commands in a folder.

    Args:
        python: The environment's Python.
        folder: The working folder.
    """

    def __init__(self, python: Path, folder: Path) -> None:
        self.folder = folder
        self._programs = python.parent
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("BORA_FL", "PYTHON"))}
        self._temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # a Unix socket's path has at most 107 characters
        weakref.finalize(self, shutil.rmtree, self._temporary, ignore_errors=True)
        self._environment = kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        self._environment |= {"BORA_FL_STATE": str(folder / "state"), "TMPDIR": str(self._temporary)}

    def __call__(self, program: str, *arguments: str) -> str:
        """What a program of the environment prints; it must succeed, and name no temporary file."""
        command = [str(self._programs / program), *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env=self._environment, capture_output=True, text=True, check=False
        )
        said = f"{done.stdout}\n{done.stderr}"
        assert done.returncode == 0, said
        assert str(self._temporary) not in said
        return done.stdout
