"""Client-level differential privacy at a trusted server: clip every client's update, noise what is merged.

The unit is the client, the neighbour a round in which one client's update is zero. Noise goes onto the *inputs* of a
merge, before any product or refactorization, which are then post-processing and cost no privacy:

- a merge that depends on the updates through their mean alone (factor means, rounds that train one factor) gets one
  noised mean, `noised_mean`: the noise is shared by all clients;
- a merge that needs the updates one by one (mean of products, robust rules) gets each of them noised, `noised_each`:
  the mean of products is no function of the mean, so the noise of other clients hides nothing there.

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


@dataclass(frozen=True)
class AdaptiveClip:
    """A clipping norm that follows a quantile of the clients' update norms (Andrew et al., 2021, arXiv:1905.03871).

    Each round `C ← C · exp(−η (b̃ − γ))`, where b̃ is the noised share of clients whose update was within C.

    Args:
        clip_norm: C of the next round.
        count_noise: σ_b, the standard deviation of the noise on the count of clients within C. The paper suggests a
            twentieth of the expected number of clients.
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

        `z_Δ = (z⁻² − (2 σ_b)⁻²)^(−1/2)`: a shifted count, ±½ a client, has sensitivity ½.

        Raises:
            ValueError: If the count alone spends more than `noise_multiplier` allows.
        """
        if noise_multiplier == 0:
            return 0.0
        left = noise_multiplier**-2 - (math.inf if self.count_noise == 0 else (2 * self.count_noise) ** -2)
        if left <= 0:
            raise ValueError(
                f"count_noise = {self.count_noise} with noise_multiplier = {noise_multiplier}: counting would spend "
                f"the whole budget; use a count_noise above {noise_multiplier / 2:g}"
            )
        return 1 / math.sqrt(left)


@dataclass(frozen=True)
class PrivacyState:
    """What a run with client-level privacy knows between rounds.

    Args:
        history: One entry a round, of one step.
        clip_norm: C of the next round, where it is adapted; None before the first such round.
        unrecorded_rounds: Rounds before these of which a checkpoint holds the number alone; they ran at the run's own
            noise, every client in each.
    """

    history: tuple[Spent, ...] = ()
    clip_norm: float | None = None
    unrecorded_rounds: int = 0

    def to_tensors(self) -> dict[str, Tensor]:
        """`rounds []` in all, `noise_multiplier [k]` and `sample_rate [k]` of the last k, `clip_norm []`."""
        tensors = {
            "rounds": torch.tensor(self.unrecorded_rounds + len(self.history)),
            "noise_multiplier": torch.tensor([spent.noise_multiplier for spent in self.history], dtype=torch.float64),
            "sample_rate": torch.tensor([spent.sample_rate for spent in self.history], dtype=torch.float64),
        }
        if self.clip_norm is not None:
            tensors["clip_norm"] = torch.tensor(self.clip_norm, dtype=torch.float64)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "PrivacyState":
        """The inverse of `to_tensors`; a checkpoint may hold the number of rounds without what each of them spent."""
        nothing = torch.zeros(0, dtype=torch.float64)
        noise, rate = (tensors.get(name, nothing).tolist() for name in ("noise_multiplier", "sample_rate"))
        history = tuple(Spent(z, q, 1) for z, q in zip(noise, rate, strict=True))
        clip_norm = tensors.get("clip_norm")
        rounds = int(tensors.get("rounds", torch.tensor(0)))
        return cls(history, None if clip_norm is None else float(clip_norm), rounds - len(history))


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
        self, noise_multiplier: float, *, sampling: Sampling, sample_rate: float, weights: Sequence[float]
    ) -> "ClientAccount":
        """Return the account after one more round, or refuse it. To be called before the round's noise is drawn.

        Args:
            noise_multiplier: Noise of the round, in multiples of the clipping norm.
            sampling: `"poisson"`: every client was drawn independently with probability `sample_rate`. `"fixed"`: a
                cohort of a fixed size was; subsampling then earns nothing here.
            sample_rate: Probability with which a client is drawn.
            weights: The clients' weights in the mean.

        Raises:
            BudgetExceeded: If the round does not fit.
            ValueError: If the weights differ: one client could then move the mean by more than the noise hides.
        """
        if len(set(weights)) > 1:
            raise ValueError(
                f"weights = {sorted(set(weights))}: client-level privacy counts every client alike; set "
                "strategy.weighting = 'uniform'"
            )
        spent = Spent(noise_multiplier, sample_rate if sampling == "poisson" else 1.0, 1)
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
    factor = math.exp(-clipping.rate * (share - clipping.quantile))
    return mean, replace(clipping, clip_norm=clipping.clip_norm * factor)


def noised_each(
    updates: Sequence[Update], clip_norm: float, noise_multiplier: float, randomness: Randomness | None = None
) -> list[dict[str, Tensor]]:
    """Return every update clipped and noised by itself, for merges that need them one by one.

    To the accountant a round is one step, since a client is in one of them only; for the same noise multiplier the mean
    carries √K times the noise of `noised_mean` over K clients.
    """
    return [privatize(update, clip_norm, noise_multiplier, randomness) for update in updates]


def _require_like(update: Update, shapes: Update) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in update.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in shapes.items()}
    if found != expected:
        odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ValueError(
            f"an update's {odd[0]!r} has shape {found.get(odd[0])} where {expected.get(odd[0])} was expected"
        )
