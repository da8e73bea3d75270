"""A ClientApp out of an existing training script: its own loop trains, this package sends, receives and merges.

The run of a Trainer is cut into the federation's rounds, and goes on in each where it stopped in the one before: a
round resumes from the Trainer's own checkpoint, with its optimizer, schedule, order of data and random state, and with
the merged adapter in place of the checkpoint's. So one client alone ends with the adapter of the script. A loop that is
no Trainer is called once a round, and its model then holds the merged adapter.
"""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from bora_fl.client.app import answer, identify
from bora_fl.client.identity import ClientIdentity
from bora_fl.client.job import perform
from bora_fl.client.leaving import leave, recall
from bora_fl.client.round import understand
from bora_fl.config import Settings
from bora_fl.models import FederatedModel, peft_config
from bora_fl.privacy.policy import SitePolicy, released
from bora_fl.state import ALL, AdapterState
from bora_fl.wire.records import Instruction
from bora_fl.wire.refusals import Code, Refused
from bora_fl.wire.release import PlainRelease

_SAME = ("peft_type", "r", "lora_alpha", "bora_alpha", "use_rslora", "use_dora", "num_blocks", "sigma_transform")

Loop = Callable[[int, int], Mapping[str, float] | None]
"""A script's own round of training: round and number of rounds to ``num_examples``, ``steps``, ``train_loss``."""
Measured = dict[str, float | int]
Work = Callable[[FederatedModel, AdapterState, Instruction, Settings], Measured]


def federate(trainer: Any, model: Any = None) -> ClientApp:
    """Make a Flower ClientApp of a Trainer, or of a loop and its model; see `bora_fl.federate`."""
    looped = model is not None
    if looped and not callable(trainer):
        raise ValueError(f"federate({type(trainer).__name__}, model): with a model, give the function of a round")
    model = model if looped else getattr(trainer, "model", None)
    if not hasattr(model, "peft_config"):
        raise ValueError(
            "the model has no adapter, which is what a federation sends; make it with peft.get_peft_model, or give an "
            "SFTTrainer its peft_config. For a loop of your own: bora_fl.federate(train, model)"
        )
    work = partial(_by_loop, trainer) if looped else partial(_by_trainer, trainer)
    app = ClientApp()
    app.query()(identify)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, lambda: perform("train", message.content, context, work=partial(_train, model, work)))

    return app


class _Round(TrainerCallback):  # type: ignore[misc]
    """Puts the received adapter in place when training goes on, and stops it, with a checkpoint, after the round."""

    def __init__(self, model: FederatedModel, received: AdapterState, instruction: Instruction, rounds: int) -> None:
        self._model, self._received, self._trains = model, received, instruction.trains
        self._round, self._rounds = instruction.round, rounds
        self.first = self._last = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin a round."""
        self._model.write(self._received)
        self._model.train_only(self._trains)  # the optimizer is there, and holds what other rounds train
        self.first = state.global_step
        left = state.max_steps - state.global_step
        # What is left is shared out over the rounds that are left, so that a round missed is made up for.
        self._last = state.global_step + -(-left // max(self._rounds - self._round + 1, 1))
        if not left:
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the round after its last step."""
        if state.global_step >= self._last:
            control.should_training_stop = control.should_save = True


def _train(
    net: Any,
    work: Work,
    settings: Settings,
    content: RecordDict,
    who: ClientIdentity,
    memory: RecordDict,
    policy: SitePolicy | None,
) -> RecordDict:
    """A round of the script's training."""
    _require_fit(net, settings)
    instruction, sent = understand(content, memory)
    if instruction.fold_version:
        raise Refused(Code.RUN_CONFIG_INVALID, "strategy.residual = 'fold': a Trainer's frozen weights are its own")
    if instruction.gram:
        raise Refused(Code.RUN_CONFIG_INVALID, "Gram matrices of a Trainer's inputs are not taken; see docs/trainer.md")
    model = FederatedModel(net, settings.adapter, settings.model, settings.run.seed)
    received = recall(memory, sent, instruction)
    model.write(received)
    started = time.perf_counter()
    measured = work(model, received, instruction, settings) | {"train_seconds": time.perf_counter() - started}
    allowed = released(policy, settings.privacy.mode)
    leaves: dict[str, Any] = {name: value for name, value in measured.items() if name.replace("_", "-") in allowed}
    release = PlainRelease(state=model.read(), partition=who.partition, rank=model.rank, **leaves)
    return leave(release, sent, received, instruction, settings, who, memory)


def _by_trainer(
    trainer: Any, model: FederatedModel, received: AdapterState, instruction: Instruction, settings: Settings
) -> Measured:
    """A round of a Trainer's run."""
    own_folder, folder = trainer.args.output_dir, Path(trainer.args.output_dir, "federated", instruction.run_id)
    callback = _Round(model, received, instruction, settings.run.num_rounds)
    model.train_only(ALL)  # the Trainer makes its optimizer once, of what trains then
    trainer.args.output_dir = str(folder)
    trainer.add_callback(callback)
    try:
        result = trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    finally:
        trainer.remove_callback(callback)
        trainer.args.output_dir = own_folder
    examples = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else 1
    steps = result.global_step - callback.first
    return {"num_examples": examples, "steps": steps, "train_loss": result.training_loss}


def _by_loop(
    loop: Loop, model: FederatedModel, received: AdapterState, instruction: Instruction, settings: Settings
) -> Measured:
    """A round of a loop of the script's own."""
    model.train_only(instruction.trains)
    model.model.train()
    found = dict(loop(instruction.round, settings.run.num_rounds) or {})
    numbers = all(isinstance(value, int | float) and 0 <= value < math.inf for value in found.values())
    if not numbers or found.keys() - {"num_examples", "steps", "train_loss"}:
        raise Refused(
            Code.TRAINING_FAILED, f"the loop returns {found!r}; return num_examples, steps and train_loss, or nothing"
        )
    return {"num_examples": 1, **found}


def _require_fit(model: Any, settings: Settings) -> None:
    """Refuse a run that a Trainer cannot serve.

    Raises:
        Refused: For a private mode, or an adapter that is not the run's.
    """
    if settings.privacy.mode != "none" or settings.privacy.secure_aggregation:
        raise Refused(
            Code.RUN_CONFIG_INVALID,
            f"privacy.mode = {settings.privacy.mode!r}, privacy.secure-aggregation = "
            f"{str(settings.privacy.secure_aggregation).lower()} with a Trainer: differential privacy needs each "
            "example's own gradient and Poisson-sampled batches, which a Trainer's loop does not have; train with "
            "bora_fl's own ClientApp",
        )
    ours, wanted = model.peft_config[model.active_adapter], peft_config(settings.adapter, settings.model)
    for name in _SAME:
        have, want = getattr(ours, name, None), getattr(wanted, name, None)
        if (have or None) != (want or None):
            raise Refused(
                Code.RUN_CONFIG_INVALID,
                f"adapter.*: the run's {name} is {want!r}, that of the Trainer's adapter {have!r}; make them the same",
            )
