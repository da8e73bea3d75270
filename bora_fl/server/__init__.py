"""The server: what starts a run, watches it, evaluates it centrally and keeps it."""

from bora_fl import preload as _preload  # noqa: F401
