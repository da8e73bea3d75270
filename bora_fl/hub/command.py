"""``bora-fl push``: upload a finished run to the Hugging Face Hub."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()
_OURS, _MODEL = "adapter_config.json", "config.json"


def push(
    folder: Annotated[Path, typer.Argument(help="output folder of a finished run, or a folder that `export` wrote")],
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub; made if it is missing")],
    public: Annotated[
        bool, typer.Option("--public", help="a repository that is made here can be read by everybody; private if not")
    ] = False,
    revision: Annotated[str, typer.Option(help="branch to upload to; made if it is missing")] = "main",
    message: Annotated[str, typer.Option(help="of the commit")] = "Upload a federated fine-tuning run",
) -> None:
    """Upload a finished run's adapter, or an exported folder, to the Hugging Face Hub.

    Logs in as `hf auth login` has it, or with HF_TOKEN. Of a run only its folder `adapter` is uploaded: weights,
    tokenizer, label names and model card, and no metrics of clients.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    from bora_fl.config import ConfigError
    from bora_fl.deployment.launch import LaunchError

    source = uploaded(folder)
    hub = HfApi()
    try:
        hub.create_repo(repo, private=not public, exist_ok=True)
        if revision != "main":
            hub.create_branch(repo, branch=revision, exist_ok=True)
        done = hub.upload_folder(repo_id=repo, folder_path=source, revision=revision, commit_message=message)
    except HFValidationError as error:
        raise ConfigError(f"REPO {repo}: {error}; give owner/name") from error
    except (HTTPError, OSError, ValueError) as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LaunchError(f"{repo}: the Hub did not take it ({text}); see `hf auth whoami`, or set HF_TOKEN") from error
    console.print(f"uploaded {source} to {done.commit_url}", highlight=False, markup=False, soft_wrap=True)


def uploaded(folder: Path) -> Path:
    """The folder that goes to the Hub.

    Raises:
        ConfigError: If there is neither a finished run nor an exported model.
    """
    from bora_fl.config import ConfigError
    from bora_fl.models import read_result

    if result := read_result(folder):
        return result.folder
    if any((folder / name).is_file() for name in (_OURS, _MODEL, "modules.json")) and not _of_a_run(folder):
        return folder
    raise ConfigError(f"FOLDER {folder}: there is no finished run and no exported model; run `bora-fl run` to its end")


def _of_a_run(folder: Path) -> bool:
    """Whether a folder is a run's, by its config: it has no result yet, and metrics of clients beside it."""
    config = folder / _MODEL
    return config.is_file() and "model.name" in json.loads(config.read_text(encoding="utf8"))
