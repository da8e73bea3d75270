"""What a run was made with: versions of Python and of the libraries, and a digest of this package's code."""

import hashlib
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

import bora_fl

LIBRARIES = ("torch", "transformers", "peft", "flwr")


def versions() -> dict[str, str]:
    """By name; ``code`` is `code_digest`, which tells two checkouts of one version apart."""
    found = {"bora_fl": bora_fl.__version__, "code": code_digest(), "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in LIBRARIES}


@cache
def code_digest() -> str:
    """The first 16 digits of the SHA-256 of every Python file of this package, the same in a checkout and a wheel."""
    digest = hashlib.sha256()
    package = Path(bora_fl.__file__).resolve().parent
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    for name in ("kernels", "simulations"):  # beside the package in a checkout, in it in a wheel
        folder = package.parent / name
        if not (package / name).is_dir():
            files |= {f"{name}/{path.relative_to(folder).as_posix()}": path for path in folder.rglob("*.py")}
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
