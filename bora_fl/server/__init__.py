"""The server: what starts a run, watches it, evaluates it centrally and keeps it."""
