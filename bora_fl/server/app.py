"""The Flower ServerApp: handlers that only translate."""

import logging
import sys

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from bora_fl import preload as _preload  # noqa: F401  (before what else imports the large libraries)
from bora_fl.config import parse
from bora_fl.server.run import Server
from bora_fl.tracking import activity

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes."""
    log_progress()
    activity.tell("load model and data")
    Server(parse(context.run_config)).run(grid)


def log_progress() -> None:
    """Let this package's log lines reach standard error, marked for whoever follows the run."""
    logger = logging.getLogger("bora_fl")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("bora-fl | %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    activity.show_on_stderr()
