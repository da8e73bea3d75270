"""The process of a simulation: the ServerApp, and the clients' workers below it. Started by `launch`."""

import json
import sys
from threading import Thread
from typing import Any

from flwr.app import Context, RecordDict

from bora_fl.config import ConfigError, Scalar, parse
from bora_fl.deployment.processes import end_with_parent, exit_on_sigterm
from bora_fl.granted import num_cores
from bora_fl.simulations.launch import MISTAKE
from bora_fl.simulations.parallel import CLIENT, WorkerGrid, load, make_pool, places

SERVER = "bora_fl.server.app:app"


def main(
    run_config: dict[str, Scalar],
    backend: str,
    num_clients: int,
    cpus_per_client: int,
    gpus_per_client: float,
    serverapp: str = SERVER,
    clientapp: str = CLIENT,
) -> None:
    """Run a federation to its end; what goes wrong is raised.

    Args:
        run_config: The whole run config.
        backend: ``processes`` or ``ray``.
        num_clients: Number of clients.
        cpus_per_client: Cores of a worker.
        gpus_per_client: GPUs of a worker, or its share of one.
        serverapp: Reference to the ServerApp.
        clientapp: Reference to the ClientApp.
    """
    if backend == "ray":
        _check(run_config)
        from bora_fl.simulations.ray_backend import run_on_ray

        run_on_ray(load(serverapp), load(clientapp), run_config, num_clients, cpus_per_client, gpus_per_client)
        return
    gpus = _num_gpus() if gpus_per_client else 0
    fitting = places(num_clients, num_cores(), gpus, cpus_per_client, gpus_per_client)
    with make_pool(clientapp, run_config, len(fitting), fitting) as pool:
        starting = Thread(target=pool.start, daemon=True)  # workers import what they need while this process does
        starting.start()
        server = load(serverapp)
        _check(run_config)
        grid = WorkerGrid(clientapp, num_clients, run_config, pool)
        starting.join()
        server(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(run_config)))


def _check(run_config: dict[str, Scalar]) -> None:
    from bora_fl.deployment.doctor.preflight import preflight
    from bora_fl.server.app import log_progress
    from bora_fl.tracking import activity

    log_progress()
    activity.tell("check data and model")
    preflight(parse(run_config))


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    arguments: dict[str, Any] = json.loads(sys.argv[1])
    end_with_parent()
    with exit_on_sigterm():
        try:
            main(**arguments)
        except ConfigError as error:
            for line in str(error).splitlines():
                print(f"{MISTAKE}{line}", file=sys.stderr)
            sys.exit(2)
