"""Client-level differential privacy of a run: every round's updates are clipped and noised before any merge sees them.

What a merge then computes, a refactorization included, is post-processing and costs nothing. A merge that is linear in
the updates needs their mean alone, so the noise is added once; the others need the updates one by one, each with noise
of its own.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from bora_fl.config import ConfigError, PrivacySettings, Settings
from bora_fl.privacy.accounting import SLACK, Budget, epsilon, merge_history, solve_noise
from bora_fl.privacy.central import (
    AdaptiveClip,
    ClientAccount,
    PrivacyState,
    adaptive_noised_mean,
    count_noise,
    noised_each,
    noised_mean,
)
from bora_fl.privacy.gaussian import Randomness, from_coordinates, to_coordinates
from bora_fl.state import AdapterState, ClientUpdate, flatten, unflatten
from bora_fl.strategies.layer_merge import Trains
from bora_fl.strategies.server_state import ServerState
from bora_fl.wire.records import part_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClientPrivacy:
    """Noise and account of a run.

    Attributes:
        settings: The privacy settings.
        num_rounds: Rounds of the whole run.
        linear: Whether the merge needs the updates' mean alone.
        sigma_transform: Of the adapter; decides whether Sigma moves in logarithms.
        frozen: Parts that the adapter method never trains, whatever the strategy asks for.
        randomness: Source of the noise; None is the operating system's.
    """

    settings: PrivacySettings
    num_rounds: int
    linear: bool
    sigma_transform: str = "exp_norm"
    frozen: Trains = frozenset()
    randomness: Randomness | None = None

    @classmethod
    def build(cls, settings: Settings, linear: bool) -> "ClientPrivacy | None":
        """For ``privacy.mode = client``; None for the other modes.

        Raises:
            ConfigError: For adaptive clipping where the merge needs the updates one by one.
        """
        privacy = settings.privacy
        if privacy.mode != "client":
            return None
        if privacy.adaptive_clipping and not linear:
            raise ConfigError(
                f"privacy.adaptive-clipping = true with strategy.name = {settings.strategy.name!r}: this merge takes "
                "updates with noise of their own, and no count of clients is released with them; set it to false, or "
                "use a strategy that needs the updates' mean alone"
            )
        return cls(privacy, settings.run.num_rounds, linear, settings.adapter.transform, settings.adapter.untrained)

    def account(self, state: ServerState) -> ClientAccount:
        """What the run has spent up to a state."""
        return self._account(state.privacy or PrivacyState())

    def noise_multiplier(self, spent: PrivacyState) -> float:
        """Return z of the next round: with it the rounds still to come use up what past rounds have left.

        It stays what it was as long as that holds, so that a run that was stopped goes on as if it had not been.

        Raises:
            ValueError: If no noise makes the rounds to come fit.
        """
        settings, left = self.settings, max(self.num_rounds - len(spent.history), 1)
        if settings.noise_multiplier:
            return settings.noise_multiplier
        if spent.history:
            last = spent.history[-1].noise_multiplier
            planned = epsilon([*spent.history, (last, 1.0, left)], settings.delta, settings.accountant)
            if (1 - 2 * SLACK) * settings.epsilon <= planned <= settings.epsilon:
                return last
        # A cohort of a fixed size is sampled, which earns no amplification: every round counts in full.
        before = tuple(merge_history(spent.history))
        return solve_noise(settings.epsilon, settings.delta, 1.0, left, settings.accountant, before)

    def check(self, state: ServerState, num_clients: int) -> None:
        """Refuse a run that cannot keep its promise, before anything is trained.

        Args:
            state: Where the run starts or goes on.
            num_clients: Clients of the federation.

        Raises:
            ConfigError: If δ is no less than one over the number of clients.
            BudgetExceeded: If the rounds to come do not fit with ``privacy.noise-multiplier``.
            ValueError: If no noise makes them fit.
        """
        settings, spent = self.settings, state.privacy or PrivacyState()
        if settings.delta * num_clients >= 1:
            raise ConfigError(
                f"privacy.delta = {settings.delta:g} with {num_clients} clients: publishing one client's update in "
                f"full would be within it; use a value well below {1 / num_clients:g}"
            )
        left = self.num_rounds - len(spent.history)
        if left <= 0:
            return
        noise = self.noise_multiplier(spent)
        self._account(spent).after_round(noise, rounds=left)
        if spent.history and noise > 2 * spent.history[-1].noise_multiplier:
            log.warning(
                "run.num-rounds = %d: past rounds have left so little of privacy.epsilon = %g that the %d to come have "
                "a noise multiplier of %.3g, where the last had %.3g",
                self.num_rounds,
                settings.epsilon,
                left,
                noise,
                spent.history[-1].noise_multiplier,
            )

    def refuses(self, update: ClientUpdate, state: ServerState) -> str:
        """Why this update counts as zero, in words; empty if it does not."""
        for name, current in state.current.layers.items():
            rank = update.state.rank(name)
            if rank != current.rank:
                return (
                    f"layer {name} has rank {rank}, the adapter {current.rank}: privacy.mode = 'client' noises every "
                    "update in the adapter's own shape; use the federation's rank on this client"
                )
        return ""

    def protect(
        self, state: ServerState, updates: Sequence[ClientUpdate], parts: Trains, expected_clients: int
    ) -> tuple[ServerState, list[ClientUpdate], float]:
        """Clip and noise a round's updates.

        Args:
            state: The state that the clients trained on.
            updates: The accepted updates, of equal weight; possibly none. One that `refuses` names counts as zero.
            parts: The parts that were trained and shared.
            expected_clients: Size of the round's cohort.

        Returns:
            The state with the round booked, what the merge may see, and ε so far.

        Raises:
            BudgetExceeded: If the round does not fit into the budget.
            ValueError: If weights differ.
        """
        spent = state.privacy or PrivacyState()
        noise = self.noise_multiplier(spent)
        account = self._account(spent).after_round(noise, weights=[update.weight for update in updates])
        spent = replace(spent, history=account.history)
        sent = flatten(state.current)
        names = [name for name in sent if part_of(name) in parts - self.frozen]
        start = to_coordinates({name: sent[name].double() for name in names}, self.sigma_transform)
        moves = [self._move(flatten(update.state), start) for update in updates if not self.refuses(update, state)]
        clip_norm = spent.clip_norm or self.settings.clip_norm
        if not self.linear:
            noised = noised_each(moves, start, clip_norm, noise, expected_clients, self.randomness)
        elif self.settings.adaptive_clipping:
            clipping = AdaptiveClip(clip_norm, count_noise(noise, expected_clients))
            mean, clipping = adaptive_noised_mean(moves, start, clipping, noise, expected_clients, self.randomness)
            spent, noised = replace(spent, clip_norm=clipping.clip_norm), [mean]
        else:
            noised = [noised_mean(moves, start, clip_norm, noise, expected_clients, self.randomness)]
        return (
            replace(state, privacy=spent),
            [self._moved(k, sent, start, move) for k, move in enumerate(noised)],
            account.epsilon(),
        )

    def _account(self, spent: PrivacyState) -> ClientAccount:
        budget = Budget(self.settings.epsilon, self.settings.delta)
        return ClientAccount(budget, self.settings.accountant, spent.history)

    def _move(self, trained: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
        end = to_coordinates({name: trained[name].double() for name in start}, self.sigma_transform)
        return {name: end[name] - start[name] for name in start}

    def _moved(
        self, client: int, sent: dict[str, Tensor], start: dict[str, Tensor], move: dict[str, Tensor]
    ) -> ClientUpdate:
        reached = from_coordinates({n: start[n] + change for n, change in move.items()}, self.sigma_transform)
        state: AdapterState = unflatten(sent | {name: tensor.to(sent[name].dtype) for name, tensor in reached.items()})
        return ClientUpdate(client, 1.0, state)
