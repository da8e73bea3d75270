"""The site's policy: whether there is one, and whether it can be used."""

import os
from pathlib import Path

from bora_fl.config import ConfigError
from bora_fl.deployment.doctor.finding import Finding
from bora_fl.privacy.policy import VARIABLE, read_policy


def check_policy(file: Path | None) -> Finding:
    """Look at a site's policy.

    Args:
        file: As the node config or the worker's command names it; left out, ``BORA_FL_POLICY``'s.
    """
    if file is None and VARIABLE in os.environ:
        file = Path(os.environ[VARIABLE])
    if file is None:
        remedy = "write one with `bora-fl init site`, and name it to the worker or in the node config (policy)"
        return Finding("policy", "warn", "there is none: the server's run config decides what this site does", remedy)
    try:
        found = read_policy(file.expanduser())
    except ConfigError as error:
        return Finding(f"policy {file}", "fail", str(error))
    return Finding(f"policy {file}", "pass", f"data set {found.data_set}, privacy.mode {', '.join(found.modes)}")
