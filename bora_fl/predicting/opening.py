"""A run's model as it is at the end, or as it was after a round that has a checkpoint."""

from pathlib import Path
from typing import Any

from bora_fl.config import ConfigError
from bora_fl.models import load_base, read_result
from bora_fl.models.result import Result, load, load_result, result_tokenizer
from bora_fl.server.checkpoint import load_round


def require_result(run: Path) -> Result:
    """What a run's folder says of its adapter.

    Raises:
        ConfigError: If it holds no finished adapter.
    """
    result = read_result(run)
    if result is None:
        raise ConfigError(f"RUN {run}: it holds no finished adapter; name the output folder of a finished run")
    return result


def rounds_of(run: Path) -> list[int]:
    """The rounds that have a checkpoint in a run's folder, in order."""
    numbers = (path.name.removeprefix("round-") for path in (run / "checkpoints").glob("round-*"))
    return sorted(int(number) for number in numbers if number.isdecimal())


def open_base(run: Path, base: str) -> tuple[Any, Any]:
    """The base model of a run as the run began with it, and its tokenizer.

    Args:
        run: The run's output folder, or its adapter's.
        base: See `open_run`.

    Raises:
        ConfigError: If there is no finished adapter, or no such model.
    """
    result = require_result(run)
    model = result.settings.model.model_copy(update={"name": base} if base else {})
    return load_base(model, result.label_names, result.settings.run.seed).eval(), result_tokenizer(result)


def open_run(run: Path, base: str, round: int | None) -> tuple[Any, Any]:
    """A run's model, ready to predict, and its tokenizer.

    Args:
        run: The run's output folder, or its adapter's.
        base: Another place of the same base model, as for ``model.name``; empty for the run's own.
        round: After which round; None for the finished adapter.

    Raises:
        ConfigError: If there is no finished adapter, or no checkpoint of the round.
        CheckpointError: If the checkpoint is damaged.
    """
    result = require_result(run)
    if round is None:
        return load(run, base)
    kept = rounds_of(run)
    if round not in kept:
        raise ConfigError(
            f"--round {round}: {run} has checkpoints of the rounds {', '.join(map(str, kept)) or 'none'} "
            "(run.keep-checkpoints says how many are kept); name one of them"
        )
    checkpoint = load_round(run / "checkpoints", round)
    loaded = load_result(result, base, at=(checkpoint.state.current, checkpoint.folds))
    return loaded.model.eval(), result_tokenizer(result)
