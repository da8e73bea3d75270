"""What leaves a site with its result: one type for each privacy mode, and nothing that is not a field of it.

Each field is annotated with what protects it. docs/privacy.md holds the same as a table; a test compares the two, and
both with every message of whole runs. What leaves in the place of a result is in `bora_fl.wire.refusals`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

from flwr.app import ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from bora_fl.privacy.policy import Mode
from bora_fl.state import AdapterState
from bora_fl.wire.records import Pack, plain, reply_content, to_arrays
from bora_fl.wire.schema import GRAMS, HEADS, METRICS, REPLY, SCHEMA

NOTHING = "nothing"
TRUSTED = "the server is trusted"
NAMED = "the server is trusted, if the policy names it"
PUBLIC = "no function of the records"


@dataclass(frozen=True, kw_only=True)
class _Common:
    """Common to all modes.

    Attributes:
        partition: Which client, by its node config.
        rank: The rank that it trains, by node config and run config.
    """

    mode: ClassVar[Mode]
    state: AdapterState
    partition: Annotated[int, PUBLIC]
    rank: Annotated[int, PUBLIC]

    def metrics(self) -> dict[str, float | int]:
        """The numbers beside the state; one that is None stays at the site."""
        return {name: value for name, value in _named(self).items() if name != "state" and value is not None}

    def content(self, sent: AdapterState, parts: frozenset[str], round: int, pack: Pack = plain) -> RecordDict:
        """As a reply's content; see `reply_content`."""
        return reply_content(self.state, sent, parts, round, self.metrics(), pack)


@dataclass(frozen=True, kw_only=True)
class PlainRelease(_Common):
    """``none``: the trained state and what was measured, all of it exact; the site's policy may withhold numbers."""

    mode = "none"
    state: Annotated[AdapterState, NOTHING]
    num_examples: Annotated[int, NOTHING] = 1
    train_loss: Annotated[float | None, NOTHING] = None
    steps: Annotated[int | None, NOTHING] = None
    train_seconds: Annotated[float | None, NOTHING] = None
    eval_loss: Annotated[float | None, NOTHING] = None
    eval_accuracy: Annotated[float | None, NOTHING] = None
    eval_examples: Annotated[int | None, NOTHING] = None


@dataclass(frozen=True, kw_only=True)
class ClientRelease(_Common):
    """``client``: the trained state, exact, for a trusted server; numbers only where the site's policy names them.

    Attributes:
        num_examples: 1 where the policy does not name it.
    """

    mode = "client"
    state: Annotated[AdapterState, TRUSTED]
    num_examples: Annotated[int, NAMED] = 1
    train_loss: Annotated[float | None, NAMED] = None
    steps: Annotated[int | None, NAMED] = None
    train_seconds: Annotated[float | None, NAMED] = None
    eval_loss: Annotated[float | None, NAMED] = None
    eval_accuracy: Annotated[float | None, NAMED] = None
    eval_examples: Annotated[int | None, NAMED] = None


@dataclass(frozen=True, kw_only=True)
class RecordRelease(_Common):
    """``record``: what DP-SGD has trained.

    Attributes:
        epsilon_per_record: The budget, which the ledger holds the site to. What is spent, and the noise, follow from
            the sampling rate, and so from the number of examples: they stay at the site.
        num_examples: 1, since weights are uniform.
    """

    mode = "record"
    state: Annotated[AdapterState, "the noise of DP-SGD"]
    epsilon_per_record: Annotated[float, PUBLIC]
    num_examples: Annotated[int, "always 1"] = 1


@dataclass(frozen=True, kw_only=True)
class LocalRelease(_Common):
    """``local``: the noised update.

    Attributes:
        epsilon_per_client: Spent so far, by the number of replies.
        noise_multiplier: Of each.
        num_examples: 1, since weights are uniform.
    """

    mode = "local"
    state: Annotated[AdapterState, "the noise on the update"]
    epsilon_per_client: Annotated[float, PUBLIC]
    noise_multiplier: Annotated[float, PUBLIC]
    num_examples: Annotated[int, "always 1"] = 1


Release = PlainRelease | ClientRelease | RecordRelease | LocalRelease


@dataclass(frozen=True)
class EvaluationRelease:
    """What the received adapter scores on the client's held-out part, exactly; ``none``, and ``client`` if allowed."""

    partition: Annotated[int, PUBLIC]
    eval_loss: Annotated[float, NOTHING]
    eval_accuracy: Annotated[float, NOTHING]
    eval_examples: Annotated[int, NOTHING]

    def content(self) -> RecordDict:
        """As a reply's content."""
        return RecordDict({METRICS: MetricRecord({**_named(self)})})


@dataclass(frozen=True)
class StatisticsRelease:
    """Sums over the client's examples for the closed-form head (`bora_fl.heads`): ``none`` and ``record``.

    Attributes:
        heads: Counts, feature sums and Gram matrix; under ``record`` with the noise of one Gaussian release.
        epsilon_per_record: Share of the budget that the release is charged with; None under ``none``.
    """

    heads: Annotated[Mapping[str, Tensor], "nothing; under record, the noise on the sums"]
    partition: Annotated[int, PUBLIC]
    epsilon_per_record: Annotated[float | None, PUBLIC] = None

    def content(self, round: int) -> RecordDict:
        """As a reply's content."""
        metrics = {name: value for name, value in _named(self).items() if name != "heads" and value is not None}
        reply = ConfigRecord({"schema": SCHEMA, "round": round})
        return RecordDict({REPLY: reply, HEADS: to_arrays(self.heads), METRICS: MetricRecord({**metrics})})


@dataclass(frozen=True)
class HeadLossesRelease:
    """Losses of several heads on the client's held-out part, exactly; ``none`` alone.

    Attributes:
        head_losses: Mean loss of each head, in the order in which they were sent.
        eval_examples: Held-out examples.
    """

    head_losses: Annotated[list[float], NOTHING]
    partition: Annotated[int, PUBLIC]
    eval_examples: Annotated[int, NOTHING]

    def content(self) -> RecordDict:
        """As a reply's content."""
        return RecordDict({METRICS: MetricRecord({**_named(self)})})


@dataclass(frozen=True)
class GramRelease:
    """Beside a trained state: what went into each adapted layer (`bora_fl.blocks.gram`), exactly; ``none`` alone.

    Attributes:
        grams: Layer to its packed Gram matrix.
    """

    grams: Annotated[Mapping[str, Tensor], NOTHING]

    def content(self) -> RecordDict:
        """What a reply holds beside the state."""
        return RecordDict({GRAMS: to_arrays(self.grams)})


def _named(release: "_Common | EvaluationRelease | StatisticsRelease | HeadLossesRelease") -> dict[str, Any]:
    return {f.name.replace("_", "-"): getattr(release, f.name) for f in fields(release)}
