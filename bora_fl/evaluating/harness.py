"""EleutherAI's lm-evaluation-harness on a model that is loaded."""

from pathlib import Path
from typing import Any, NamedTuple

from bora_fl.config import ConfigError, extras
from bora_fl.device import settle


class Options(NamedTuple):
    """How tasks are evaluated.

    Attributes:
        tasks: Names of tasks or groups of the harness.
        folder: Where tasks of one's own lie as YAML files; None for the harness's alone.
        limit: Examples of each task at most; 0 is all.
        few_shot: Solved examples before each; -1 is what each task says.
        batch_size: Sequences per forward pass.
        chat_template: Whether prompts are written by the tokenizer's chat template.
    """

    tasks: tuple[str, ...]
    folder: Path | None = None
    limit: int = 0
    few_shot: int = -1
    batch_size: int = 8
    chat_template: bool = False


def require_tasks(options: Options) -> Any:
    """The harness's task manager, if it has every task.

    Raises:
        ConfigError: If the harness is not installed, or for a task or a folder that is not there.
    """
    extras.require("evaluation", "bora-fl evaluate", "lm_eval")
    from lm_eval.tasks import TaskManager

    if options.folder is not None and not options.folder.is_dir():
        raise ConfigError(f"--task-folder {options.folder}: there is no such folder")
    if not options.tasks:
        raise ConfigError("--tasks: name at least one task; `lm_eval ls tasks` lists them")
    unknown = list(options.tasks)
    for defaults in (False, True) if options.folder else (True,):  # to index the harness's own takes seconds
        manager = TaskManager(include_path=str(options.folder or "") or None, include_defaults=defaults)
        unknown = [name for name in options.tasks if not manager.match_tasks([name])]
        if not unknown:
            break
    if unknown:
        raise ConfigError(
            f"--tasks {','.join(unknown)}: the harness has no such task; `lm_eval ls tasks` lists them, and "
            "--task-folder adds YAML files of your own"
        )
    return manager


def run_tasks(model: Any, tokenizer: Any, options: Options, manager: Any) -> dict[str, dict[str, float]]:
    """Evaluate a causal language model.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        options: Tasks and how they are evaluated.
        manager: From `require_tasks`.

    Returns:
        Each task's metrics, by their names in the harness without its filter ``none``.

    Raises:
        ConfigError: If a task's data cannot be read.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    settle(model)
    try:
        found = simple_evaluate(
            model=HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=options.batch_size),
            tasks=manager.match_tasks(list(options.tasks)),
            task_manager=manager,
            num_fewshot=None if options.few_shot < 0 else options.few_shot,
            limit=options.limit or None,
            apply_chat_template=options.chat_template,
            log_samples=False,
        )
    except (OSError, ValueError, KeyError) as error:  # of `datasets`, the hub and a task's own YAML
        raise ConfigError(f"--tasks {','.join(options.tasks)}: {' '.join(str(error).split())[:500]}") from error
    assert found is not None
    return {
        task: {name.removesuffix(",none"): float(v) for name, v in metrics.items() if isinstance(v, int | float)}
        for task, metrics in found["results"].items()
    }
