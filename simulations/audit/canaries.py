"""Train privately on data with canaries in it, and see how well they can be told apart.

A canary is a sequence of random tokens with a random class (or, for a language model, to be predicted as it stands): no
other record speaks for it, so what the model knows of it, it learned from it. Each is put into the data with
probability ½; the product's own loop trains; a canary's score is how far its loss fell. `bora_fl.privacy.audit` makes a
lower bound of ε of the scores.
"""

import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bora_fl.client.optimizers import round_factors
from bora_fl.client.private import train_privately_for_a_round
from bora_fl.client.site import Site
from bora_fl.client.training import train
from bora_fl.config import ConfigError, HeadSettings, Settings
from bora_fl.data import Encoded
from bora_fl.evaluate import example_losses
from bora_fl.models import FederatedModel
from bora_fl.paths import state_in
from bora_fl.privacy.accounting import Unit
from bora_fl.privacy.audit import AuditResult, audit, draw_inclusion
from bora_fl.privacy.gaussian import Randomness
from bora_fl.seeds import derive
from bora_fl.state import ALL

LENGTH = 8


@dataclass(frozen=True)
class Audit:
    """What was claimed, and what was found.

    Attributes:
        claimed: ε of the client's ledger after training; infinity without privacy.
        found: The lower bound.
        noise_multiplier: z of the training; 0 without privacy.
        fell: Mean score over the canaries that were included, and over the others: how far a record's loss fell, or
            how far what was released lies in a client's direction.
        unit: Whose presence was hidden.
    """

    claimed: float
    found: AuditResult
    noise_multiplier: float
    fell: tuple[float, float]
    unit: Unit = "record"

    @property
    def refuted(self) -> bool:
        """Whether the claim cannot be, at the bound's confidence."""
        return self.found.epsilon > self.claimed


def run_audit(
    settings: Settings, canaries: int, *, confidence: float = 0.95, inclusion: Randomness | None = None
) -> Audit:
    """Train one client with canaries among its records, by the rounds that the settings plan, and bound ε from below.

    Args:
        settings: `privacy.mode` is `"record"`, or `"none"` to see what training without privacy gives away.
        canaries: How many are drawn; about half of them are trained on.
        confidence: Of the bound.
        inclusion: Decides which; left out, the operating system's.

    Raises:
        ConfigError: If the settings are of another mode, or there are too few canaries.
    """
    if settings.privacy.mode not in ("record", "none"):
        raise ConfigError(
            f"privacy.mode = {settings.privacy.mode!r}: these canaries are records, of which record is audited, or none"
        )
    if canaries < 32:
        raise ConfigError(f"--canaries {canaries}: too few to find anything; give 32 or more")
    settings = settings.model_copy(update={"head": HeadSettings(init="random")})  # its sums are no training
    site = Site(settings)
    model, data = site.model(), site.data(0, 1).train
    drawn = make_canaries(data, canaries, vocabulary(model), derive(settings.run.seed, "canaries", 0))
    included = draw_inclusion(canaries, inclusion)
    records = concatenate(data, drawn.select(torch.nonzero(included).flatten().numpy()))
    model.train_only(ALL)
    before = losses(model, drawn)
    claimed, noise = _train(model, records, settings)
    fall = before - losses(model, drawn)
    found = audit(fall.nan_to_num(nan=-1e9), included, settings.privacy.delta, confidence=confidence)
    return Audit(claimed, found, noise, (float(fall[included].mean()), float(fall[~included].mean())))


def make_canaries(like: Encoded, count: int, words: int, seed: int, length: int = LENGTH) -> Encoded:
    """Random tokens between the first and last of an ordinary example, with random classes if there are classes.

    Args:
        like: Ordinary examples.
        count: How many.
        words: Size of the vocabulary.
        seed: Of the draws.
        length: Tokens of each.
    """
    generator = np.random.default_rng(seed)
    length = min(length, like.max_length)
    tokens = generator.integers(0, words, (count, length), dtype=np.int32)
    first, last = like.begin[0], like.begin[0] + like.lengths[0] - 1
    tokens[:, 0], tokens[:, -1] = like.tokens[first], like.tokens[last]
    classes = None
    if like.classes is not None:
        classes = generator.choice(np.unique(like.classes), count).astype(np.int64)
    return replace(
        like,
        tokens=tokens.reshape(-1),
        begin=np.arange(count, dtype=np.int64) * length,
        lengths=np.full(count, length, dtype=np.int64),
        prompts=np.zeros(count, dtype=np.int64),
        classes=classes,
    )


def concatenate(first: Encoded, second: Encoded) -> Encoded:
    """All examples of both."""
    classes = None
    if first.classes is not None and second.classes is not None:
        classes = np.concatenate([first.classes, second.classes])
    return replace(
        first,
        tokens=np.concatenate([first.tokens, second.tokens]),
        begin=np.concatenate([first.begin, second.begin + len(first.tokens)]),
        lengths=np.concatenate([first.lengths, second.lengths]),
        prompts=np.concatenate([first.prompts, second.prompts]),
        classes=classes,
    )


def losses(model: FederatedModel, data: Encoded, batch_size: int = 128) -> Tensor:
    """Each example's mean loss, `[examples]`."""
    found = []
    device = next(model.model.parameters()).device
    model.model.eval()
    with torch.inference_mode():
        for start in range(0, len(data), batch_size):
            batch = data.batch(np.arange(start, min(start + batch_size, len(data))))
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = inputs.pop("labels")
            total, targets, _ = example_losses(model.model(**inputs).logits, labels)
            found.append((total / targets.clamp(min=1)).cpu())
    return torch.cat(found)


def _train(model: FederatedModel, records: Encoded, settings: Settings) -> tuple[float, float]:
    """Train all planned rounds; returns the claimed ε and the noise multiplier."""
    claimed, noise = math.inf, 0.0
    with tempfile.TemporaryDirectory() as folder, state_in(Path(folder)):
        privacy = settings.privacy.model_copy(update={"ledger_dir": folder})
        settings = settings.model_copy(update={"privacy": privacy})
        for number in range(1, settings.run.num_rounds + 1):
            factors = round_factors(settings, number, len(records))
            if privacy.mode == "none":
                seed = derive(settings.run.seed, "batches", number, 0)
                train(model, records, settings.train, factors=factors, seed=seed)
                continue
            spent = train_privately_for_a_round(model, records, settings, factors=factors, run_id="audit", partition=0)
            claimed, noise = float(spent["epsilon-per-record"]), float(spent["noise-multiplier"])
    return claimed, noise


def vocabulary(model: FederatedModel) -> int:
    """Tokens that the model knows."""
    return int(model.model.get_input_embeddings().weight.shape[0])
