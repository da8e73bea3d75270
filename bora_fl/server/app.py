"""The Flower ServerApp: handlers that only translate."""

import logging
import sys

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from bora_fl import preload as _preload  # noqa: F401  (before what else imports the large libraries)
from bora_fl.config import ConfigError, parse
from bora_fl.data import FetchError
from bora_fl.server.checkpoint import CheckpointError
from bora_fl.server.run import Server
from bora_fl.tracking import activity

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes."""
    log_progress()
    activity.tell("load model and data")
    Server(parse(context.run_config)).run(grid)


class _NoTraceback(logging.Filter):
    """Leaves out where an error was raised, which Flower logs, if the error says what is wrong and what to do."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record through."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, ConfigError | FetchError | CheckpointError):
            error.__cause__, error.__suppress_context__ = None, True
            record.exc_info = (type(error), error, None)
        return True


def log_progress() -> None:
    """Let this package's log lines reach standard error, marked for whoever follows the run."""
    logger = logging.getLogger("bora_fl")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("bora-fl | %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logging.getLogger("flwr").addFilter(_NoTraceback())
    activity.show_on_stderr()
