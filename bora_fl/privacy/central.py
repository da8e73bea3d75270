"""Client-level differential privacy at a trusted server: clip every client's update, noise what is merged.

The unit is the client. Neighbours differ in one client: its updates are as they are, or they are zero, or they do not
count (no reply, or one that is refused); the size of the cohort is the same. Noise goes onto the *inputs* of a merge,
before any product or refactorization, which are then post-processing and cost no privacy:

- a merge that depends on the updates through their mean alone (factor means, rounds that train one factor) gets one
  noised mean, `noised_mean`: the noise is shared by all clients;
- a merge that needs the updates one by one (mean of products) gets each of them noised, `noised_each`: the mean of
  products is no function of the mean, so the noise of other clients hides nothing there. Who is missing has a noised
  zero, and the order is random, so that neither number nor place tells who it was.

Arithmetic is in float64, whatever the updates' dtype.

Updates are differences from what was sent, as named tensors; leave out what was not trained. Sigma moves in logarithms
(`bora_fl.privacy.gaussian.to_coordinates`), where a noised value stays positive.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bora_fl.privacy.accounting import Accountant, Budget, BudgetExceeded, Spent, Unit, epsilon
from bora_fl.privacy.gaussian import Randomness, SystemRandomness, add_noise, clip, privatize, require_mechanism

Update = Mapping[str, Tensor]
Sampling = Literal["poisson", "fixed"]

_HISTORY, _CLIP, _COUNTED = "history", "clip_norm", "rounds"


@dataclass(frozen=True)
class AdaptiveClip:
    """A clipping norm that follows a quantile of the clients' update norms (Andrew et al., 2021, arXiv:1905.03871).

    Each round `C ← C · exp(−η (b̃ − γ))`, where b̃ is the noised share of clients whose update was within C, cut to
    [0, 1]: no draw of the noise moves C by more than `exp(η)`.

    A client counts +½ within C, −½ beyond it, 0 if it is missing. The count's sensitivity is 1, not the paper's ½: an
    update that becomes zero goes from −½ to +½.

    Args:
        clip_norm: C of the next round.
        count_noise: σ_b, the standard deviation of the noise on the count of clients within C; see `count_noise`.
        quantile: γ, in (0, 1).
        rate: η, above 0.

    Raises:
        ValueError: If a setting is out of range.
    """

    clip_norm: float
    count_noise: float
    quantile: float = 0.5
    rate: float = 0.2

    def __post_init__(self) -> None:
        if not (self.clip_norm > 0 and math.isfinite(self.clip_norm)):
            raise ValueError(f"clip_norm = {self.clip_norm}: start from a finite value above 0")
        if not (self.count_noise >= 0 and 0 < self.quantile < 1 and self.rate > 0):
            raise ValueError(
                f"count_noise = {self.count_noise}, quantile = {self.quantile}, rate = {self.rate}: noise is at least "
                "0, the quantile lies strictly between 0 and 1, the rate is above 0"
            )

    def update_noise(self, noise_multiplier: float) -> float:
        """Return the noise multiplier of the updates, so that updates and count together spend as `noise_multiplier`.

        `z_Δ = (z⁻² − σ_b⁻²)^(−1/2)`: the releases are independent Gaussians of sensitivities C and 1, and together one
        Gaussian whose sensitivity over noise is `(z_Δ⁻² + σ_b⁻²)^(1/2) = z⁻¹`.

        Raises:
            ValueError: If the count alone spends more than `noise_multiplier` allows.
        """
        if noise_multiplier == 0:
            return 0.0
        left = noise_multiplier**-2 - (math.inf if self.count_noise == 0 else self.count_noise**-2)
        if left <= 0:
            raise ValueError(
                f"count_noise = {self.count_noise} with noise_multiplier = {noise_multiplier}: counting would spend "
                f"the whole budget; use a count_noise above {noise_multiplier:g}"
            )
        return 1 / math.sqrt(left)


def count_noise(noise_multiplier: float, expected_clients: float) -> float:
    """Return σ_b: a twentieth of the clients as in the paper, but never so little that counting takes over a tenth.

    The tenth is of `z⁻²`, which is what composes: the updates' noise grows by at most 5.5 %, for any number of clients.
    """
    return max(expected_clients / 20, noise_multiplier * math.sqrt(10))


@dataclass(frozen=True)
class PrivacyState:
    """What client-level privacy keeps between rounds.

    Attributes:
        history: What each round so far has spent: its noise multiplier, sample rate and 1 step.
        clip_norm: C of the next round under adaptive clipping; None before the first.
    """

    history: tuple[Spent, ...] = ()
    clip_norm: float | None = None

    def to_tensors(self) -> dict[str, Tensor]:
        """As named tensors, for checkpoints: `history` [rounds, 3] and `clip_norm` [], float64."""
        tensors = {_HISTORY: torch.tensor(self.history, dtype=torch.float64)} if self.history else {}
        if self.clip_norm is not None:
            tensors[_CLIP] = torch.tensor(self.clip_norm, dtype=torch.float64)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "PrivacyState":
        """The inverse of `to_tensors`; other names are left alone.

        Raises:
            ValueError: If rounds are counted without the noise that they had, as in checkpoints of the first format.
        """
        if _COUNTED in tensors:
            raise ValueError(
                f"the checkpoint holds {int(tensors[_COUNTED])} rounds with privacy.mode = 'client' and not their "
                "noise, so that what they spent is not known; start anew in another run.output-dir"
            )
        rows = tensors[_HISTORY].tolist() if _HISTORY in tensors else []
        history = tuple(Spent(noise, rate, int(steps)) for noise, rate, steps in rows)
        return cls(history, float(tensors[_CLIP]) if _CLIP in tensors else None)


@dataclass(frozen=True)
class ClientAccount:
    """What a run has spent per client; a value, to be kept in the server's checkpoint.

    Args:
        budget: ε and δ of the run.
        accountant: `"prv"` or `"rdp"`.
        history: Rounds spent so far.
    """

    budget: Budget
    accountant: Accountant = "prv"
    history: tuple[Spent, ...] = ()
    unit: ClassVar[Unit] = "client"

    def epsilon(self) -> float:
        """Return ε spent so far at the budget's δ."""
        return epsilon(self.history, self.budget.delta, self.accountant)

    def after_round(
        self,
        noise_multiplier: float,
        *,
        sampling: Sampling = "fixed",
        sample_rate: float = 1.0,
        weights: Sequence[float] = (),
        rounds: int = 1,
    ) -> "ClientAccount":
        """Return the account after one more round, or refuse it. To be called before the round's noise is drawn.

        Args:
            noise_multiplier: Noise of the round, in multiples of the clipping norm.
            sampling: `"poisson"`: every client was drawn independently with probability `sample_rate`. `"fixed"`: a
                cohort of a fixed size was; subsampling then earns nothing here.
            sample_rate: Probability with which a client is drawn.
            weights: The clients' weights in the mean.
            rounds: More than one to ask whether as many would fit.

        Raises:
            BudgetExceeded: If the round does not fit.
            ValueError: If the weights differ: one client could then move the mean by more than the noise hides.
        """
        if len(set(weights)) > 1:
            raise ValueError(
                f"weights = {sorted(set(weights))}: client-level privacy counts every client alike; set "
                "strategy.weighting = 'uniform'"
            )
        spent = Spent(noise_multiplier, sample_rate if sampling == "poisson" else 1.0, rounds)
        after = replace(self, history=(*self.history, spent))
        if after.epsilon() > self.budget.epsilon:
            raise BudgetExceeded("the run's budget", self.budget, self.epsilon(), spent, after.epsilon(), self.unit)
        return after


def noised_mean(
    updates: Sequence[Update],
    shapes: Update,
    clip_norm: float,
    noise_multiplier: float,
    expected_clients: float,
    randomness: Randomness | None = None,
) -> dict[str, Tensor]:
    """Return `(Σ_k clip(update_k) + N(0, (z C)²)) / expected_clients`.

    Args:
        updates: The round's updates; possibly none, and the noise is then all there is.
        shapes: Tensors of the names, shapes and dtypes that an update has.
        clip_norm: C, over all tensors of an update together.
        noise_multiplier: z.
        expected_clients: Sample rate times number of clients. The number that answered is private.
        randomness: Left out, the operating system's.

    Raises:
        ValueError: If a setting is out of range, or an update has other tensors than `shapes`.
    """
    require_mechanism(clip_norm, noise_multiplier)
    if not expected_clients > 0:
        raise ValueError(f"expected_clients = {expected_clients}: it is sample rate times number of clients, above 0")
    randomness = randomness or SystemRandomness()
    sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in shapes.items()}
    for update in updates:
        _require_like(update, shapes)
        for name, tensor in clip(update, clip_norm)[0].items():
            sums[name] += tensor
    std = noise_multiplier * clip_norm
    return {
        name: (add_noise(total, std, randomness) / expected_clients).to(shapes[name].dtype)
        for name, total in sums.items()
    }


def adaptive_noised_mean(
    updates: Sequence[Update],
    shapes: Update,
    clipping: AdaptiveClip,
    noise_multiplier: float,
    expected_clients: float,
    randomness: Randomness | None = None,
) -> tuple[dict[str, Tensor], AdaptiveClip]:
    """Return the noised mean, and the clipping of the next round.

    Both together are one step of noise multiplier `noise_multiplier` to an accountant. Arguments as in `noised_mean`.
    """
    update_noise = clipping.update_noise(noise_multiplier)
    randomness = randomness or SystemRandomness()
    mean = noised_mean(updates, shapes, clipping.clip_norm, update_noise, expected_clients, randomness)
    within = [0.5 if clip(update, clipping.clip_norm)[1] <= clipping.clip_norm else -0.5 for update in updates]
    count = torch.tensor(sum(within), dtype=torch.float64)
    share = float(add_noise(count, clipping.count_noise, randomness)) / expected_clients + 0.5
    share = min(max(share, 0.0), 1.0)
    factor = math.exp(-clipping.rate * (share - clipping.quantile))
    return mean, replace(clipping, clip_norm=clipping.clip_norm * factor)


def noised_each(
    updates: Sequence[Update],
    shapes: Update,
    clip_norm: float,
    noise_multiplier: float,
    expected_clients: int,
    randomness: Randomness | None = None,
) -> list[dict[str, Tensor]]:
    """Return `expected_clients` updates, each clipped and noised by itself, for merges that need them one by one.

    To the accountant a round is one step, since a client is in one of them only; for the same noise multiplier the mean
    carries √K times the noise of `noised_mean` over K clients.

    Args:
        updates: The round's updates, at most `expected_clients`; a noised zero stands for each that is missing.
        shapes: Tensors of the names, shapes and dtypes that an update has.
        clip_norm: C, over all tensors of an update together.
        noise_multiplier: z.
        expected_clients: Size of the cohort.
        randomness: Left out, the operating system's; of the order too.

    Raises:
        ValueError: If a setting is out of range, or an update has other tensors than `shapes`.
    """
    if len(updates) > expected_clients:
        raise ValueError(f"{len(updates)} updates with expected_clients = {expected_clients}: it is the cohort's size")
    randomness = randomness or SystemRandomness()
    for update in updates:
        _require_like(update, shapes)
    zero = {name: torch.zeros_like(tensor) for name, tensor in shapes.items()}
    complete = [*updates, *[zero] * (expected_clients - len(updates))]
    noised = [privatize(update, clip_norm, noise_multiplier, randomness) for update in complete]
    return [noised[k] for k in randomness.uniform(expected_clients).argsort().tolist()]


def _require_like(update: Update, shapes: Update) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in update.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in shapes.items()}
    if found != expected:
        odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ValueError(
            f"an update's {odd[0]!r} has shape {found.get(odd[0])} where {expected.get(odd[0])} was expected"
        )
