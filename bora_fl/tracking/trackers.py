"""The trackers that come along, each as a sink. Their libraries are the extra ``tracking``."""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROJECT = "bora-fl"


class TensorBoard:
    """Event files in the run's folder ``tensorboard``."""

    def __init__(self) -> None:
        self._library: Any = importlib.import_module("torch.utils.tensorboard")

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Begin."""
        self._writer = self._library.SummaryWriter(str(folder / "tensorboard"))

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """A round."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def finish(self) -> None:
        """End."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, in the project ``bora-fl`` unless ``WANDB_PROJECT`` names another."""

    def __init__(self) -> None:
        import wandb

        self._library: Any = wandb

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Begin."""
        self._run = self._library.init(
            name=folder.name, dir=str(folder), config=dict(config), project=_project("WANDB")
        )

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """A round."""
        self._run.log(dict(values), step=round)

    def finish(self) -> None:
        """End."""
        self._run.finish()


class Trackio:
    """A run of Hugging Face's trackio, on this machine, in the project ``bora-fl`` or ``TRACKIO_PROJECT``."""

    def __init__(self) -> None:
        import trackio

        self._library: Any = trackio

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Begin."""
        self._library.init(project=_project("TRACKIO"), name=folder.name, config=dict(config))

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """A round."""
        self._library.log(dict(values), step=round)

    def finish(self) -> None:
        """End."""
        self._library.finish()


class MLflow:
    """A run of MLflow, at ``MLFLOW_TRACKING_URI``."""

    def __init__(self) -> None:
        import mlflow

        self._library: Any = mlflow

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Begin."""
        self._library.start_run(run_name=folder.name)
        self._library.log_params(dict(config))

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """A round."""
        self._library.log_metrics(dict(values), step=round)

    def finish(self) -> None:
        """End."""
        self._library.end_run()


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio, "mlflow": MLflow}
"""By their names in ``run.sinks``."""


def _project(prefix: str) -> str:
    return os.environ.get(f"{prefix}_PROJECT", PROJECT)
