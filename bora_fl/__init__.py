"""Federated fine-tuning with BoRA adapters (block-diversified low-rank adaptation)."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# `kernels/` and `simulations/` stand at the top of a checkout and of a Flower App Bundle, yet are imported as
# `bora_fl.kernels` and `bora_fl.simulations`: Hugging Face publishes a package that is imported as `kernels`.
# A wheel already holds both folders inside the package.
_root = _Path(__file__).resolve().parent.parent
if not (_Path(__file__).resolve().parent / "kernels").is_dir() and (_root / "kernels" / "reference.py").is_file():
    __path__.append(str(_root))
