"""A simulation on Flower's Ray backend, for more than one machine.

Ray's processes listen on all interfaces, and whoever may talk to them runs code. A Ray that is started here demands a
token that only this run knows; a cluster's owner sets ``RAY_AUTH_MODE=token`` on every machine.
"""

import os
import secrets
import warnings
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from bora_fl.config import Scalar


class Configured(ClientApp):
    """A ClientApp with a run config, which Flower's Python entry point has no argument for."""

    def __init__(self, app: ClientApp, run_config: dict[str, Scalar]) -> None:
        super().__init__()
        self._configured, self._run_config = app, run_config

    def __call__(self, message: Message, context: Context) -> Message:
        """The app's reply."""
        inner = with_config(context, self._run_config)
        reply = self._configured(message, inner)
        context.state = inner.state
        return reply


def with_config(context: Context, run_config: dict[str, Scalar]) -> Context:
    """A context with a run config; Flower lets nobody change that of the one that it gave."""
    return Context(context.run_id, context.node_id, context.node_config, context.state, dict(run_config))


def run_on_ray(
    server: ServerApp,
    client: ClientApp,
    run_config: dict[str, Scalar],
    num_clients: int,
    cpus_per_client: int,
    gpus_per_client: float,
) -> None:
    """Run a federation on the cluster that ``RAY_ADDRESS`` names, else on a Ray of its own on this machine.

    Args:
        server: The ServerApp; what it raises is raised here.
        client: The ClientApp.
        run_config: The whole run config.
        num_clients: Number of clients.
        cpus_per_client: Cores of each actor.
        gpus_per_client: GPUs of each actor, or its share of one.
    """
    if not os.environ.get("RAY_ADDRESS"):
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    from flwr.simulation import run_simulation

    configured = ServerApp()

    @configured.main()
    def main(grid: Grid, context: Context) -> None:
        server(grid, with_config(context, run_config))

    resources: dict[str, Any] = {"num_cpus": cpus_per_client, "num_gpus": gpus_per_client}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated for `flwr run`, which opens a port to all local users
        run_simulation(
            server_app=configured,
            client_app=Configured(client, run_config),
            num_supernodes=num_clients,
            backend_config={"client_resources": resources},
        )
