"""A simulation in a process of its own, followed to its end: ``bora-fl run --simulate``.

This process stays small, and shows what the other one writes. Neither opens a port that anybody could give orders to,
and when this one ends, however it ends, so does the other, with all its descendants.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from bora_fl.config import ConfigError, Scalar, extensions, extras, parse
from bora_fl.deployment.flower_app import app_table
from bora_fl.deployment.launch import LaunchError, Outcome, Show, flower_environment, readable, reason
from bora_fl.deployment.processes import Service, exit_on_sigterm
from bora_fl.deployment.progress import pass_on
from bora_fl.granted import grant, num_cores
from bora_fl.report import read_rows
from bora_fl.server.output_folder import make

MISTAKE = "bora-fl | error: "  # what `process` begins such a line with
BACKENDS = ("processes", "ray")


@dataclass(frozen=True)
class Simulation:
    """Size and resources of a simulated federation.

    Attributes:
        num_clients: Number of clients, at least 1.
        cpus_per_client: Cores of a client at work, at least 1.
        gpus_per_client: GPUs of a client at work, or its share of one.
        backend: ``processes`` on this machine, or ``ray``, on the cluster that ``RAY_ADDRESS`` names, else here; empty
            for Ray if ``RAY_ADDRESS`` is set.
    """

    num_clients: int = 4
    cpus_per_client: int = 1
    gpus_per_client: float = 0.0
    backend: str = ""

    def __post_init__(self) -> None:
        for option, value, least in (
            ("--simulate", self.num_clients, 1),
            ("--cpus", self.cpus_per_client, 1),
            ("--gpus", self.gpus_per_client, 0),
        ):
            if value < least:
                raise ConfigError(f"{option} {value}: at least {least}")
        if self.backend and self.backend not in BACKENDS:
            raise ConfigError(f"--backend {self.backend}: use one of {', '.join(BACKENDS)}")


def run(app: Path, run_config: Mapping[str, Scalar], simulation: Simulation, *, show: Show = print) -> Outcome:
    """Run a simulation to its end.

    Args:
        app: The Flower app: a checkout or an unpacked bundle. The working directory may be none: then the installed
            package is run.
        run_config: Overrides of the app's run config; checked before anything starts.
        simulation: Size and resources.
        show: See `Show`.

    Raises:
        ConfigError: For a setting that cannot be used, a package that is missing, a strategy that cannot merge, or data
            or a model that does not fit.
        LaunchError: If the run failed in any other way.
    """
    components, defaults = _read(app)
    settings = parse({**defaults, **run_config})
    extras.require_for(settings)
    if extensions.reference("strategies", settings.strategy.name):
        from bora_fl.strategies.trial import tried  # with torch, which this process starts without

        tried(settings)
    folder = output_folder(app, run_config)
    make(folder)
    backend = simulation.backend or ("ray" if os.environ.get("RAY_ADDRESS") else "processes")
    if backend == "ray":
        extras.require("ray", "--backend ray")
    arguments = asdict(simulation) | components | {"backend": backend}
    arguments["run_config"] = settings.flat() | {"run.output-dir": str(folder)}
    environment = flower_environment()
    if backend == "processes" and "OMP_NUM_THREADS" not in environment:
        # A worker's threads are those of its cores; the server evaluates while no worker is busy, on all of them.
        environment |= {"OMP_NUM_THREADS": str(simulation.cpus_per_client)} | grant(num_cores(), 0)
    if components:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(app), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-P", "-m", "bora_fl.simulations.process", json.dumps(arguments)]
    process = Service("run", command, folder, environment, directory=Path.cwd(), tied=True)
    if backend == "ray" and os.environ.get("RAY_ADDRESS") and os.environ.get("RAY_AUTH_MODE") != "token":
        show(
            "warning: whoever reaches this Ray cluster's ports runs code on it; set RAY_AUTH_MODE=token on all machines"
        )
    show(f"starting {simulation.num_clients} clients; the first round also loads the model and the data")
    with exit_on_sigterm():
        try:
            process.start()
            for line in process.follow():
                if not (text := readable(line)) or not text.startswith("error: "):
                    pass_on(line, text, show)
            code = process.wait(0)
        except (KeyboardInterrupt, SystemExit):
            show("interrupted; the same command with -c run.resume=true goes on after the last finished round")
            raise
        finally:
            process.stop()
    if code == 2 and (wrong := [line for line in process.text().splitlines() if line.startswith(MISTAKE)]):
        raise ConfigError("\n".join(line.removeprefix(MISTAKE) for line in wrong))
    if code != 0:
        raise LaunchError(f"the run ended with code {code}: {reason(process.text())} (the whole log: {process.log})")
    rows = read_rows(folder / "metrics.jsonl")
    whole = bool(rows) and (rows[-1]["round"] == settings.run.num_rounds or settings.run.patience > 0)
    if not whole or not (folder / "adapter").is_dir():
        raise LaunchError(f"the run ended without a result; the last lines of {process.log}:\n{process.tail(25)}")
    return Outcome(process.log, folder, rows)


def output_folder(app: Path, run_config: Mapping[str, Scalar]) -> Path:
    """Where a simulation will write.

    Raises:
        ConfigError: For a setting that cannot be used.
    """
    return Path(parse({**_read(app)[1], **run_config}).run.output_dir).expanduser().resolve()


def _read(app: Path) -> tuple[dict[str, str], dict[str, Scalar]]:
    """References to an app's components, and its run config; nothing for the installed package."""
    table = app_table(app)
    config = {f"{group}.{key}": value for group, keys in table.get("config", {}).items() for key, value in keys.items()}
    return {name: str(reference) for name, reference in table.get("components", {}).items()}, config
