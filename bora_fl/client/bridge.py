"""A ClientApp out of an existing training script: its Trainer trains, this package sends, receives and merges.

The Trainer's run is cut into the federation's rounds, and goes on in each where it stopped in the one before: a round
resumes from the Trainer's own checkpoint, with its optimizer, schedule, order of data and random state, and with the
merged adapter in place of the checkpoint's. So one client alone ends with the adapter of the script.
"""

import time
from collections.abc import Mapping
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
from bora_fl.client.round import leave, recall, understand
from bora_fl.config import Settings
from bora_fl.models import FederatedModel, peft_config
from bora_fl.privacy.policy import SitePolicy, released
from bora_fl.state import AdapterState
from bora_fl.wire.refusals import Code, Refused
from bora_fl.wire.release import PlainRelease

_SAME = ("peft_type", "r", "lora_alpha", "bora_alpha", "use_rslora", "use_dora", "num_blocks", "sigma_transform")


def federate(trainer: Any) -> ClientApp:
    """Make a Flower ClientApp of a Trainer; see `bora_fl.federate`."""
    if not hasattr(trainer.model, "peft_config"):
        raise ValueError(
            "trainer.model has no adapter, which is what a federation sends; make it with peft.get_peft_model, or give "
            "an SFTTrainer its peft_config"
        )
    app = ClientApp()
    app.query()(identify)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        work = partial(_train, trainer)
        return answer(message, lambda: perform("train", message.content, context, work=work))

    return app


class _Round(TrainerCallback):  # type: ignore[misc]
    """Puts the received adapter in place when training goes on, and stops it, with a checkpoint, after the round."""

    def __init__(self, model: FederatedModel, received: AdapterState, round: int, rounds: int) -> None:
        self._model, self._received, self._round, self._rounds = model, received, round, rounds
        self.first = self._last = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin a round."""
        self._model.write(self._received)
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
    trainer: Any,
    settings: Settings,
    content: RecordDict,
    who: ClientIdentity,
    memory: RecordDict,
    policy: SitePolicy | None,
) -> RecordDict:
    """A round of the Trainer's run."""
    _require_fit(trainer.model, settings)
    instruction, sent = understand(content, memory)
    if instruction.fold_version:
        raise Refused(Code.RUN_CONFIG_INVALID, "strategy.residual = 'fold': a Trainer's frozen weights are its own")
    if instruction.gram:
        raise Refused(Code.RUN_CONFIG_INVALID, "Gram matrices of a Trainer's inputs are not taken; see docs/trainer.md")
    model = FederatedModel(trainer.model, settings.adapter, settings.model, settings.run.seed)
    received = recall(memory, sent, instruction)
    model.write(received)
    model.train_only(instruction.trains)
    own_folder, folder = trainer.args.output_dir, Path(trainer.args.output_dir, "federated", instruction.run_id)
    callback = _Round(model, received, instruction.round, settings.run.num_rounds)
    started = time.perf_counter()
    trainer.args.output_dir = str(folder)
    trainer.add_callback(callback)
    try:
        result = trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    finally:
        trainer.remove_callback(callback)
        trainer.args.output_dir = own_folder
    state = model.read()
    measured: Mapping[str, float | int] = {
        "num_examples": len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else 1,
        "steps": result.global_step - callback.first,
        "train_loss": result.training_loss,
        "train_seconds": time.perf_counter() - started,
    }
    allowed = released(policy, settings.privacy.mode)
    leaves: dict[str, Any] = {name: value for name, value in measured.items() if name.replace("_", "-") in allowed}
    release = PlainRelease(state=state, partition=who.partition, rank=model.rank, **leaves)
    return leave(release, sent, received, instruction, settings, who, memory)


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
