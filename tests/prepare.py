"""Fetch what tests need beside the environment into `.build/`, once: ``python -m tests.prepare`` (`make test` does)."""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

BUILD = Path(__file__).resolve().parents[1] / ".build"
KERNELS = "kernels>=0.17"


def upstream_peft() -> Path:
    """The `tests` folder of the installed PEFT's source distribution."""
    version = importlib.metadata.version("peft")
    target = BUILD / f"peft-{version}"
    if not (target / "tests").is_dir():
        BUILD.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
            _pip("download", "--no-deps", "--no-binary", ":all:", "-d", scratch, f"peft=={version}")
            with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
                safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 has it
                archive.extractall(scratch, **safely)
            if not target.exists():
                os.replace(Path(scratch) / target.name, target)
    return target / "tests"


def hugging_face_kernels() -> Path:
    """A folder with Hugging Face's package `kernels`, whose import name ours must not take."""
    target = BUILD / "hugging-face-kernels"
    if not (target / "kernels").is_dir():
        BUILD.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
            _pip("install", "--no-deps", "--target", f"{scratch}/kernels", KERNELS)
            if not target.exists():
                os.replace(f"{scratch}/kernels", target)
    return target


def _pip(action: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", action, "--quiet", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip {action} {arguments[-1]} failed: {done.stderr.strip()}")


if __name__ == "__main__":
    print(upstream_peft(), hugging_face_kernels())
