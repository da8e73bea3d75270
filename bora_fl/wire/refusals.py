"""Why a site did not do what it was asked: codes of a closed list, which are all that leaves the site.

The text of an error may hold what stands in a record or in a path of the site. It stays in the site's log, under a
random id; the server is sent code and id, and shows the sentence that stands here.
"""

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum


class Code(StrEnum):
    """What a refusal may say, with the sentence that the server shows."""

    sentence: str

    def __new__(cls, code: str, sentence: str) -> "Code":
        """A member is its code; the sentence goes along."""
        member = str.__new__(cls, code)
        member._value_ = code
        member.sentence = sentence
        return member

    @classmethod
    def of(cls, text: object) -> "Code | None":
        """The member that a text is the code of."""
        return next((code for code in cls if code == text), None)

    POLICY_INVALID = "policy-invalid", "the site's policy file is missing or cannot be used"
    POLICY_MODE = "policy-mode", "the site's policy does not allow this privacy.mode"
    POLICY_BUDGET = (
        "policy-budget",
        "privacy.epsilon or privacy.delta is larger than the site's policy or the size of its data allows",
    )
    POLICY_NOISE = (
        "policy-noise",
        "privacy.clip-norm or privacy.noise-multiplier is out of the bounds of the site's policy",
    )
    POLICY_SECURE_AGGREGATION = "policy-secure-aggregation", "the site's policy wants privacy.secure-aggregation"
    POLICY_MODEL = "policy-model", "model.name and model.revision are not among those that the site's policy trusts"
    POLICY_VERSION = "policy-version", "this version of bora-fl is not among those that the site's policy trusts"
    STATISTICS_WITHHELD = "statistics-withheld", "the site does not release statistics of its classes and features"
    EVALUATION_WITHHELD = "evaluation-withheld", "the site does not release exact losses and accuracies in this mode"
    BUDGET_EXCEEDED = (
        "budget-exceeded",
        "the privacy budget does not allow these steps on top of what is spent; nothing was trained",
    )
    LEDGER_UNREADABLE = "ledger-unreadable", "the site's privacy ledger cannot be read or written; nothing was trained"
    AUDIT_LOG_UNWRITABLE = "audit-log-unwritable", "the site's audit log cannot be written, so nothing leaves it"
    NODE_CONFIG_INVALID = (
        "node-config-invalid",
        'the node config cannot be used; start the SuperNode with --node-config "partition-id=0 num-partitions=3"',
    )
    RUN_CONFIG_INVALID = "run-config-invalid", "the site cannot use the run config"
    SCHEMA_MISMATCH = (
        "schema-mismatch",
        "the site speaks another wire schema; install one bora-fl version on the server and on every site",
    )
    STRATEGY_FOREIGN = (
        "strategy-foreign",
        "the message is not of bora-fl's strategies, and to average its packed adapters as Flower does means nothing; "
        "start FederatedStrategy in the ServerApp: strategy.name and strategy.server-optimizer have FedAvg, FedAvgM, "
        "FedAdam and FedYogi",
    )
    MESSAGE_INVALID = "message-invalid", "the site cannot understand the message"
    PROTOCOL_MISMATCH = (
        "protocol-mismatch",
        "the message is not of secure aggregation's protocol, or out of its order, and nothing leaves in the clear",
    )
    DATA_UNREADABLE = "data-unreadable", "the site's data cannot be read, or lacks what the run config names"
    MODEL_UNAVAILABLE = "model-unavailable", "the base model cannot be loaded or adapted at the site"
    STATE_MISSING = (
        "state-missing",
        "the site does not hold the part of the adapter that was not sent again; it is sent with the next round",
    )
    FOLDS_MISSING = "folds-missing", "the site lacks folds of the frozen weights"
    FOLDS_TOO_LARGE = (
        "folds-too-large",
        "what the run adds to the frozen weights takes more disk than the site gives it (folds-mb of its policy, or "
        "half of what is free); lower strategy.residual-rank, or use a strategy without folds",
    )
    RANK_MISMATCH = (
        "rank-mismatch",
        "the node config's rank is not the federation's rank, which secure aggregation, and local privacy with a "
        "strategy that keeps some factors on the client, need",
    )
    UPDATE_OUT_OF_RANGE = (
        "update-out-of-range",
        "an entry of the update is beyond privacy.clipping-range and would be cut; raise it, or lower "
        "train.learning-rate",
    )
    WEIGHT_OUT_OF_RANGE = (
        "weight-out-of-range",
        "the site has more examples than privacy.max-examples; raise it, or set strategy.weighting to uniform",
    )
    WORKER_UNAVAILABLE = "worker-unavailable", "the site's worker cannot be reached, ended, or was not done in time"
    OUT_OF_MEMORY = "out-of-memory", "the site ran out of memory; lower train.batch-size or model.max-length"
    TRAINING_DIVERGED = "training-diverged", "the loss stopped being finite; lower train.learning-rate"
    TRAINING_FAILED = "training-failed", "training under privacy failed; what was booked stays spent"
    INTERNAL_ERROR = "internal-error", "something else went wrong"


_BY_NAME = {
    "BudgetExceeded": Code.BUDGET_EXCEEDED,
    "MemoryError": Code.OUT_OF_MEMORY,
    "OutOfMemoryError": Code.OUT_OF_MEMORY,
    "FloatingPointError": Code.TRAINING_DIVERGED,
}
"""Exceptions by name: a process that only passes messages on knows the names, and loads none of the libraries."""


IN_CLEAR = (
    "privacy.secure-aggregation = true, and the message is not of its protocol: nothing leaves this site in the clear; "
    "use the same setting on the server"
)


class Refused(ValueError):  # noqa: N818  (named for what happened)
    """The site does not do what it was asked.

    Attributes:
        code: What leaves.
        folds_held: The newest fold version that the site holds, where it lacks folds.
        error_id: Set where the text is already in a log under that id.
    """

    def __init__(self, code: Code, text: str = "", *, folds_held: int | None = None, error_id: str = "") -> None:
        super().__init__(text or code.sentence)
        self.code, self.folds_held, self.error_id = code, folds_held, error_id


def code_of(error: Exception) -> Code:
    """The code of any exception."""
    if isinstance(error, Refused):
        return error.code
    known = (_BY_NAME[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _BY_NAME)
    if "can't allocate memory" in str(error):  # torch on a CPU
        return Code.OUT_OF_MEMORY
    return next(known, Code.INTERNAL_ERROR)


@contextmanager
def refuse_as(code: Code, *keep: Code) -> Iterator[None]:
    """Give whatever goes wrong inside one code, but a refusal its own.

    Args:
        code: The code.
        *keep: Codes that stay what they are.

    Raises:
        Refused: In the place of any other exception, with its text.
    """
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        found = code_of(error)
        raise Refused(found if found in keep else code, f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Refusal:
    """What leaves a site in the place of a result.

    Attributes:
        code: Why.
        error_id: Random; the text is in the site's log under it.
        folds_held: The newest fold version that the site holds, where it lacks folds.
    """

    code: Code
    error_id: str = field(default_factory=lambda: secrets.token_hex(4))
    folds_held: int | None = None

    def line(self) -> str:
        """As one line, for a reply that is a bare error."""
        return f"{self.code} {self.error_id}: {self.code.sentence}"


def explain(code: object, error_id: object) -> str:
    """What the server shows of a refusal: nothing that is not of the closed list, whatever was sent."""
    known = Code.of(code)
    if known is None:
        return "a refusal with a code that is not known here"
    shown = error_id if isinstance(error_id, str) and re.fullmatch("[0-9a-f]{8}", error_id) else "none"
    return f"{known}: {known.sentence} (error {shown} in the site's log)"
