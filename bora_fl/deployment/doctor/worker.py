"""The site's worker: whether it answers, and is of this version."""

from bora_fl import __version__
from bora_fl.client.worker.address import WorkerSettings
from bora_fl.client.worker.stub import WorkerError, status
from bora_fl.config import ConfigError
from bora_fl.deployment.doctor.finding import Finding


def check_worker(settings: WorkerSettings) -> Finding:
    """Ask a worker what it is doing, as a ClientApp would reach it."""
    subject = f"worker {settings.address}"
    try:
        found = status(settings)
    except (ConfigError, WorkerError) as error:
        return Finding(subject, "fail", str(error))
    if found.version != __version__:
        remedy = "restart it from the environment that holds the run's version"
        return Finding(subject, "fail", f"is bora-fl {found.version}, this is {__version__}", remedy)
    return Finding(subject, "pass", f"answers; {found.base_loads} base models loaded, {found.trained} rounds trained")
