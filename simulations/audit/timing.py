"""What the time of a reply tells under record-level privacy: whether one long record is among a client's short ones.

A batch is padded to its longest text, so that the steps that draw the long record take longer. Each trial trains one
round, with the record or without it; its score is the time that the training took, which the server sees as the time
of the reply. ε bounds the area under the ROC curve (AUC) of whatever the noise protects by `e^ε / (1 + e^ε)`: time is
not among that.
"""

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from bora_fl.client.private import train_privately_for_a_round
from bora_fl.client.site import Site
from bora_fl.config import HeadSettings, Settings
from bora_fl.data import Encoded
from bora_fl.paths import state_in
from bora_fl.simulations.audit.canaries import concatenate, make_canaries, vocabulary
from bora_fl.state import ALL

SHORT = 8  # tokens of the other records


@dataclass(frozen=True)
class TimeAudit:
    """What the time of replies tells of the long record.

    Attributes:
        at_once: AUC if a reply leaves as soon as it is ready.
        scheduled: AUC if it leaves at whole multiples of `every` seconds, as with the policy's ``reply-not-before``.
        every: Twice the longest training.
        seconds: Mean time with the record, and without it.
        allowed: AUC that ε allows.
        trials: Of either kind.
    """

    at_once: float
    scheduled: float
    every: float
    seconds: tuple[float, float]
    allowed: float
    trials: int


def run_time_audit(settings: Settings, trials: int) -> TimeAudit:
    """Train one round with the long record and one without it, `trials` times, and compare the times.

    Times are the process's CPU seconds, which other work on the machine does not blur.

    Args:
        settings: Of record-level privacy.
        trials: Of either kind.
    """
    settings = settings.model_copy(update={"head": HeadSettings(init="random")})
    site = Site(settings)
    model, data = site.model(), site.data(0, 1).train
    words = vocabulary(model)
    short = make_canaries(data, len(data), words, 0, min(SHORT, data.max_length))
    both = {False: short, True: concatenate(short, make_canaries(data, 1, words, 1, data.max_length))}
    model.train_only(ALL)
    _seconds(site, both[True], settings)  # what is slow only once
    order = [bool(member) for member in np.random.default_rng(settings.run.seed).permutation(trials * [True, False])]
    seconds = np.array([_seconds(site, both[member], settings) for member in order])
    members, every = np.array(order), 2 * float(seconds.max())
    means = float(seconds[members].mean()), float(seconds[~members].mean())
    allowed = 1 / (1 + math.exp(-settings.privacy.epsilon))
    return TimeAudit(auc(seconds, members), auc(np.ceil(seconds / every), members), every, means, allowed, trials)


def auc(scores: "np.ndarray", members: "np.ndarray") -> float:
    """Probability that a member's score is above another's, ties by half.

    Args:
        scores: ``[trials]``.
        members: ``[trials]``, bool.
    """
    inside, outside = int(members.sum()), int((~members).sum())
    return float((rankdata(scores)[members].sum() - inside * (inside + 1) / 2) / (inside * outside))


def _seconds(site: Site, data: Encoded, settings: Settings) -> float:
    with tempfile.TemporaryDirectory() as folder, state_in(Path(folder)):
        privacy = settings.privacy.model_copy(update={"ledger_dir": folder})
        own = settings.model_copy(update={"privacy": privacy})
        started = time.process_time()
        train_privately_for_a_round(site.model(), data, own, run_id="audit", partition=0)
        return time.process_time() - started
