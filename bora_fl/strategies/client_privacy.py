"""Client-level differential privacy of a run: every round's updates are clipped and noised before any merge sees them.

What a merge then computes, a refactorization included, is post-processing and costs nothing. A merge that is linear in
the updates needs their mean alone, so the noise is added once; the others need the updates one by one, each with noise
of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from bora_fl.config import PrivacySettings, Settings
from bora_fl.privacy.accounting import Budget, Spent, solve_noise
from bora_fl.privacy.central import (
    AdaptiveClip,
    ClientAccount,
    PrivacyState,
    adaptive_noised_mean,
    noised_each,
    noised_mean,
)
from bora_fl.privacy.gaussian import Randomness, from_coordinates, to_coordinates
from bora_fl.state import AdapterState, ClientUpdate, flatten, unflatten
from bora_fl.strategies.layer_merge import Trains
from bora_fl.strategies.server_state import ServerState
from bora_fl.wire.records import part_of


@dataclass(frozen=True)
class ClientPrivacy:
    """Noise and account of a run.

    Attributes:
        settings: The privacy settings.
        noise_multiplier: z of every round.
        linear: Whether the merge needs the updates' mean alone.
        sigma_transform: Of the adapter; decides whether Sigma moves in logarithms.
        frozen: Parts that the adapter method never trains, whatever the strategy asks for.
        randomness: Source of the noise; None is the operating system's.
    """

    settings: PrivacySettings
    noise_multiplier: float
    linear: bool
    sigma_transform: str = "exp_norm"
    frozen: Trains = frozenset()
    randomness: Randomness | None = None

    @classmethod
    def build(cls, settings: Settings, linear: bool) -> "ClientPrivacy | None":
        """For ``privacy.mode = client``, with the noise solved once for all rounds; None for the other modes."""
        privacy = settings.privacy
        if privacy.mode != "client":
            return None
        # A cohort of a fixed size is sampled, which earns no amplification: every round counts in full.
        noise = privacy.noise_multiplier or solve_noise(
            privacy.epsilon, privacy.delta, 1.0, settings.run.num_rounds, privacy.accountant
        )
        return cls(privacy, noise, linear, settings.adapter.transform, settings.adapter.untrained)

    def account(self, state: ServerState) -> ClientAccount:
        """What the run has spent up to a state."""
        spent = state.privacy or PrivacyState()
        unrecorded = (Spent(self.noise_multiplier, 1.0, spent.unrecorded_rounds),) if spent.unrecorded_rounds else ()
        budget = Budget(self.settings.epsilon, self.settings.delta)
        return ClientAccount(budget, self.settings.accountant, (*unrecorded, *spent.history))

    def protect(
        self, state: ServerState, updates: Sequence[ClientUpdate], parts: Trains, expected_clients: int
    ) -> tuple[ServerState, list[ClientUpdate], float]:
        """Clip and noise a round's updates.

        Args:
            state: The state that the clients trained on.
            updates: The accepted updates, all of the adapter's rank and of equal weight.
            parts: The parts that were trained and shared.
            expected_clients: Size of the round's cohort.

        Returns:
            The state with the round booked, what the merge may see, and ε so far.

        Raises:
            BudgetExceeded: If the round does not fit into the budget.
            ValueError: If weights or shapes differ.
        """
        weights = [update.weight for update in updates]
        account = self.account(state).after_round(
            self.noise_multiplier, sampling="fixed", sample_rate=1.0, weights=weights
        )
        sent = flatten(state.current)
        names = [name for name in sent if part_of(name) in parts - self.frozen]
        start = to_coordinates({name: sent[name] for name in names}, self.sigma_transform)
        moves = [self._move(flatten(update.state), start) for update in updates]
        spent = state.privacy or PrivacyState()
        spent = replace(spent, history=(*spent.history, account.history[-1]))
        if not self.linear:
            noised = noised_each(moves, self.settings.clip_norm, self.noise_multiplier, self.randomness)
            seen = [self._moved(u.client, sent, start, move) for u, move in zip(updates, noised, strict=True)]
            return replace(state, privacy=spent), seen, account.epsilon()
        if self.settings.adaptive_clipping:
            norm = self.settings.clip_norm if spent.clip_norm is None else spent.clip_norm
            clipping = AdaptiveClip(norm, count_noise=expected_clients / 20)
            mean, after = adaptive_noised_mean(
                moves, start, clipping, self.noise_multiplier, expected_clients, self.randomness
            )
            spent = replace(spent, clip_norm=after.clip_norm)
        else:
            mean = noised_mean(
                moves, start, self.settings.clip_norm, self.noise_multiplier, expected_clients, self.randomness
            )
        return replace(state, privacy=spent), [self._moved(0, sent, start, mean)], account.epsilon()

    def _move(self, trained: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
        end = to_coordinates({name: trained[name] for name in start}, self.sigma_transform)
        return {name: end[name] - start[name] for name in start}

    def _moved(
        self, client: int, sent: dict[str, Tensor], start: dict[str, Tensor], move: dict[str, Tensor]
    ) -> ClientUpdate:
        reached = {name: start[name] + change for name, change in move.items()}
        state: AdapterState = unflatten(sent | from_coordinates(reached, self.sigma_transform))
        return ClientUpdate(client, 1.0, state)
