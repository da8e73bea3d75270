"""``bora-fl ui``: the page of a run or a comparison."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()


def ui(
    run: Annotated[Path, typer.Argument(help="output folder of a run, or of a comparison")],
    output: Annotated[
        Path | None, typer.Option(help="file to write; report.html in the folder by default", show_default=False)
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="open it in the browser too")] = False,
) -> None:
    """Write a page of a run or a comparison: one HTML file with curves, clients, privacy, settings; no network.

    Of a run that goes on it holds the rounds so far. A comparison writes its page itself.
    """
    from bora_fl.page.run_page import run_page
    from bora_fl.paths import write_atomically

    compared = run / "report.html"
    if (run / "results.json").is_file() and compared.is_file():
        path = output or compared
        if path != compared:
            write_atomically(path, compared.read_text(encoding="utf8"))
    else:
        path = output or compared
        write_atomically(path, run_page(run), mode=0o600)  # as private as the metrics it shows
    console.print(f"  {path}", highlight=False, soft_wrap=True)
    if show:
        typer.launch(path.resolve().as_uri())
