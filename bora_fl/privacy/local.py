"""Local privacy of a client's update: booked before training, clipped and noised before it leaves.

The update (trained minus received, over every tensor that is sent, Sigma in logarithms) is one release of the Gaussian
mechanism, `bora_fl.privacy.gaussian.privatize`, whatever happened in training. The server is not trusted.
"""

from dataclasses import dataclass

from bora_fl.config import Settings
from bora_fl.privacy.accounting import solve_noise
from bora_fl.privacy.gaussian import Randomness, from_coordinates, privatize, to_coordinates
from bora_fl.privacy.ledger import planned_rounds, site_ledger
from bora_fl.privacy.policy import SitePolicy
from bora_fl.state import AdapterState, flatten, unflatten
from bora_fl.wire.records import part_of
from bora_fl.wire.refusals import Code, refuse_as


@dataclass(frozen=True)
class LocalPrivacy:
    """One booked reply.

    Attributes:
        clip_norm: C, of the whole update.
        noise_multiplier: z.
        epsilon: ε that the client has spent at the budget's δ, this reply included.
        sigma_transform: Of the adapter; decides whether Sigma moves in logarithms.
        frozen: Parts that the method never trains, whatever the strategy asks for.
    """

    clip_norm: float
    noise_multiplier: float
    epsilon: float
    sigma_transform: str
    frozen: frozenset[str] = frozenset()

    @classmethod
    def book(cls, settings: Settings, run_id: str, partition: int, policy: SitePolicy | None = None) -> "LocalPrivacy":
        """Book a reply in the site's ledger, on disk when this returns; the noise is solved once for all rounds.

        Raises:
            BudgetExceeded: If it does not fit into the budget.
            Refused: If the ledger on disk cannot be read.
        """
        privacy = settings.privacy
        with refuse_as(Code.LEDGER_UNREADABLE):
            ledger = site_ledger(settings, run_id, partition, "client", policy)
        noise = privacy.noise_multiplier or solve_noise(
            privacy.epsilon, privacy.delta, 1.0, planned_rounds(settings), privacy.accountant
        )
        spent = ledger.spend(noise, 1.0, 1)
        return cls(privacy.clip_norm, noise, spent, settings.adapter.transform, settings.adapter.untrained)

    def protect(
        self,
        trained: AdapterState,
        received: AdapterState,
        parts: frozenset[str],
        randomness: Randomness | None = None,
    ) -> AdapterState:
        """Clip and noise what will be sent.

        Args:
            trained: The state after training.
            received: The state that training started from.
            parts: The parts that are sent, of A, sigma, B, tensors; the others are returned as trained.
            randomness: Left out, the operating system's.
        """
        after, before = flatten(trained), flatten(received)
        sent = [name for name in after if part_of(name) in parts - self.frozen]
        start = to_coordinates({name: before[name] for name in sent}, self.sigma_transform)
        end = to_coordinates({name: after[name] for name in sent}, self.sigma_transform)
        move = {name: end[name] - start[name] for name in sent}
        noised = privatize(move, self.clip_norm, self.noise_multiplier, randomness)
        reached = {name: start[name] + change for name, change in noised.items()}
        return unflatten(after | from_coordinates(reached, self.sigma_transform))
