"""``bora-fl certificates``: the certificates and keys of a federation over TLS."""

from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console

certificates = typer.Typer(no_args_is_help=True, help="Make the certificates and keys of a federation over TLS.")
console = Console()


@certificates.command("server")
def server_certificates(
    host: Annotated[list[str], typer.Option(help="DNS name or IP address that the sites dial; may be given again")],
    into: Annotated[Path, typer.Option(help="folder to write")] = Path("certificates"),
    days: Annotated[int, typer.Option(help="how long they are valid", min=1, max=36500)] = 365,
) -> None:
    """Make an authority, the server's certificate and its SuperExec secret; ca.crt goes to every site."""
    from bora_fl.deployment.certificates import make_server

    _list(make_server(into, host, days))


@certificates.command("site")
def site_keys(
    name: Annotated[str, typer.Argument(help="the site's name")],
    into: Annotated[Path, typer.Option(help="folder to write")] = Path("certificates"),
) -> None:
    """Make a site's keys and its SuperExec secret; NAME.key.pub and NAME.csr alone leave the site, for the server."""
    from bora_fl.deployment.certificates import make_client, make_site

    _list([*make_site(into, name), *make_client(into, name)])


@certificates.command("operator")
def operator_key(
    name: Annotated[str, typer.Argument(help="the operator's name")],
    into: Annotated[Path, typer.Option(help="folder to write")] = Path("certificates"),
) -> None:
    """Make the key of an operator who submits runs from another machine; NAME.csr goes to the server."""
    from bora_fl.deployment.certificates import make_client

    _list(make_client(into, name))


@certificates.command("sign")
def sign_client(
    requests: Annotated[list[Path], typer.Argument(help="NAME.csr of sites or operators", metavar="NAME.csr ...")],
    role: Annotated[str, typer.Option(help="site or operator: which of the server's doors opens")],
    authority: Annotated[Path, typer.Option(help="folder of ca.crt and ca.key")] = Path("certificates"),
    days: Annotated[int, typer.Option(help="how long it is valid", min=1, max=36500)] = 365,
) -> None:
    """Certify clients to the server's proxy; each NAME.crt, beside its request, goes back to its client."""
    from bora_fl.config import ConfigError
    from bora_fl.deployment.certificates import Role, sign

    chosen = next((known for known in get_args(Role) if known == role), None)
    if chosen is None:
        raise ConfigError(f"--role {role}: use one of {', '.join(get_args(Role))}")
    _list([sign(request, chosen, authority, days) for request in requests])


def _list(paths: list[Path]) -> None:
    for path in paths:
        console.print(f"  {path}", highlight=False, soft_wrap=True)
