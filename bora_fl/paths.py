"""The folder for what can be made again: converted models, fetched data, folds of the frozen weights."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``BORA_FL_CACHE``, else ``~/.cache/bora_fl``."""
    return Path(os.environ.get("BORA_FL_CACHE") or Path.home() / ".cache" / "bora_fl").expanduser()
