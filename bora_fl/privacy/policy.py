"""A site's policy: what a run may ask of the site, whatever its run config says.

The site's operator writes a TOML file, and names it to the site's own processes. A run asks; `grant` gives the settings
that hold at the site, or refuses with a code. The policy names the data, the ledger and its folder, so that no setting
of a run makes old records look new.
"""

import difflib
import os
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import AliasGenerator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bora_fl import __version__
from bora_fl.config import ConfigError, Scalar, Settings
from bora_fl.config.groups import Positive
from bora_fl.wire.refusals import Code, Refused

Mode = Literal["none", "record", "client", "local"]
Metric = Literal["num-examples", "train-loss", "steps", "train-seconds", "eval-loss", "eval-accuracy", "eval-examples"]
Request = Literal["train", "evaluate", "head-statistics", "head-losses"]

VARIABLE = "BORA_FL_POLICY"
EVALUATION: frozenset[Metric] = frozenset({"eval-loss", "eval-accuracy", "eval-examples"})
PROTECTED: frozenset[Mode] = frozenset({"record", "local"})
"""Modes under which no number that is computed from the records without noise leaves, whatever a policy says."""


class _Group(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=AliasGenerator(alias=lambda name: name.replace("_", "-")),
        allow_inf_nan=False,
    )


class Bounds(_Group):
    """What a run may ask for in one privacy mode."""

    epsilon: Positive = Field(1.0, description="most that all runs together may spend on the data set, per unit")
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(1e-5, description="largest delta; below 1 / (number of records)")
    max_clip_norm: Positive = Field(10.0, description="largest privacy.clip-norm")
    min_noise_multiplier: Annotated[float, Field(ge=0)] = Field(
        0.3, description="least privacy.noise-multiplier, where the run sets one"
    )
    max_noise_multiplier: Positive = Field(1000.0, description="largest privacy.noise-multiplier")


class SitePolicy(_Group):
    """A site's policy; keys of the file have hyphens."""

    data_set: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = Field(
        description="the data set's name, by which its ledger goes: it stays when rows are added, and a run cannot "
        "change it"
    )
    data_path: Annotated[str, Field(min_length=1)] = Field(
        description="where the data is (as data.name of a run, which it replaces)"
    )
    models: Annotated[list[str], Field(min_length=1)] = Field(
        description='base models that the site trusts, as "name" or "name@revision"; "*" is any'
    )
    versions: list[str] = Field([], description="versions of bora-fl that the site trusts; empty is any")
    modes: Annotated[list[Mode], Field(min_length=1)] = Field(
        ["record", "local"],
        description="privacy modes that a run may use; client trusts the server, none protects nobody",
    )
    secure_aggregation: bool = Field(False, description="refuse runs without privacy.secure-aggregation")
    ledger_folder: str = Field("", description="where ledgers are; empty is <state folder>/ledger")
    metrics: list[Metric] | None = Field(
        None,
        description="exact numbers that leave in the modes none and client; left out: all in none, none in client",
    )
    head_statistics: bool = Field(False, description="release class counts, feature sums and Gram matrix for the head")
    folds_mb: Annotated[int, Field(ge=0)] = Field(
        0, description="megabytes of disk for what all runs add to the frozen weights; 0: half of what is free"
    )
    reply_not_before: Annotated[float, Field(ge=0)] = Field(
        0.0, description="seconds: replies leave at whole multiples of it after the message came; 0 is at once"
    )
    record: Bounds = Field(Bounds(), description="bounds of privacy.mode = record; the unit is one record")
    local: Bounds = Field(Bounds(), description="bounds of privacy.mode = local; the unit is the client")
    client: Bounds = Field(Bounds(), description="bounds of privacy.mode = client; the unit is the client")

    @field_validator("data_set")
    @classmethod
    def _names_one_ledger(cls, name: str) -> str:
        if name.endswith("-client"):
            raise ValueError("a ledger per client has this ending; choose another name")
        return name

    @model_validator(mode="after")
    def _bounds_are_bounds(self) -> Self:
        for mode in ("record", "local", "client"):
            bounds: Bounds = getattr(self, mode)
            if bounds.min_noise_multiplier > bounds.max_noise_multiplier:
                raise ValueError(f"[{mode}] min-noise-multiplier is above max-noise-multiplier: nothing is allowed")
        return self

    @property
    def ledger(self) -> str:
        """The name that the data set's ledger goes by; no fingerprint of contents looks like it."""
        return f"set-{self.data_set}"

    def trusts(self, name: str, revision: str) -> bool:
        """Whether a base model is among those that are trusted; an entry without revision trusts all of them."""
        return bool({"*", name, f"{name}@{revision}"} & set(self.models))


def read_policy(path: Path) -> SitePolicy:
    """Read a policy file.

    Raises:
        ConfigError: If it is missing, anyone may change it, or it holds an unknown key or a wrong value.
    """
    try:
        if path.stat().st_mode & stat.S_IWOTH:
            raise ConfigError(f"policy {path}: anyone may change it; run chmod o-w {path}")
        return SitePolicy.model_validate(tomllib.loads(path.read_text(encoding="utf8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"policy {path}: {error}; `bora-fl init site` writes one") from error
    except ValidationError as error:
        lines = [f"policy {path}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError("\n".join(lines)) from error


def find_policy(node_config: Mapping[str, Scalar], own: Path | None = None) -> SitePolicy | None:
    """This site's policy: the process's own, else ``BORA_FL_POLICY``'s, else the node config's ``policy``.

    Args:
        node_config: The SuperNode's.
        own: The file that the process was started with.

    Returns:
        The policy; None if none is named anywhere.

    Raises:
        Refused: If one is named and cannot be used, or the node config holds what may be meant as one.
    """
    named = own if own is not None else os.environ.get(VARIABLE, node_config.get("policy"))
    if named is None:
        near = difflib.get_close_matches("policy", [key.lower() for key in node_config], n=1, cutoff=0.7)
        if near:
            raise Refused(Code.POLICY_INVALID, f"the node config holds {near[0]!r}; if policy is meant, write policy")
        return None
    if not isinstance(named, str | Path) or not str(named):
        raise Refused(Code.POLICY_INVALID, f"policy = {named!r}: name a file")
    try:
        return read_policy(Path(named).expanduser())
    except ConfigError as error:
        raise Refused(Code.POLICY_INVALID, str(error)) from error


def released(policy: SitePolicy | None, mode: Mode) -> frozenset[Metric]:
    """The exact numbers that leave the site in a mode."""
    if mode in PROTECTED:
        return frozenset()
    if policy is not None and policy.metrics is not None:
        return frozenset(policy.metrics)
    return frozenset(get_args(Metric)) if mode == "none" else frozenset()


def grant(policy: SitePolicy | None, settings: Settings, request: Request) -> Settings:
    """The settings that hold at the site for what a run asks.

    Args:
        policy: The site's; without one a run decides, as in simulations, but nothing leaves that the mode withholds.
        settings: The run's.
        request: What the message asks for.

    Returns:
        The run's settings, with the data and the ledger folder of the site.

    Raises:
        Refused: If the run asks for less protection than the site wants.
    """
    privacy = settings.privacy
    measures = request in ("evaluate", "head-losses")
    in_clear = request == "evaluate" and privacy.secure_aggregation  # the losses of heads leave masked
    of_no_use = request == "head-losses" and not settings.solves_head
    if in_clear or of_no_use or (measures and not released(policy, privacy.mode) >= EVALUATION):
        raise Refused(Code.EVALUATION_WITHHELD)
    if request == "head-statistics" and not (settings.solves_head and (policy is None or policy.head_statistics)):
        raise Refused(Code.STATISTICS_WITHHELD)
    if policy is None:
        return settings
    if privacy.mode not in policy.modes:
        raise Refused(Code.POLICY_MODE, f"privacy.mode = {privacy.mode!r}, the policy allows {', '.join(policy.modes)}")
    if policy.secure_aggregation and not privacy.secure_aggregation:
        raise Refused(Code.POLICY_SECURE_AGGREGATION)
    if policy.versions and __version__ not in policy.versions:
        raise Refused(Code.POLICY_VERSION, f"bora-fl {__version__}, the policy trusts {', '.join(policy.versions)}")
    if not policy.trusts(settings.model.name, settings.model.revision):
        raise Refused(
            Code.POLICY_MODEL,
            f"model.name = {settings.model.name!r}, model.revision = {settings.model.revision!r}: not in the policy",
        )
    if privacy.mode != "none":
        _require_within(getattr(policy, privacy.mode), settings)
    return settings.model_copy(
        update={
            "data": settings.data.model_copy(update={"name": policy.data_path}),
            "privacy": privacy.model_copy(update={"ledger_dir": policy.ledger_folder}),
        }
    )


def _require_within(bounds: Bounds, settings: Settings) -> None:
    privacy = settings.privacy
    for key, asked, most in (("epsilon", privacy.epsilon, bounds.epsilon), ("delta", privacy.delta, bounds.delta)):
        if asked > most:
            raise Refused(Code.POLICY_BUDGET, f"privacy.{key} = {asked:g}, the policy allows {most:g}")
    noise = privacy.noise_multiplier
    if noise and not bounds.min_noise_multiplier <= noise <= bounds.max_noise_multiplier:
        raise Refused(Code.POLICY_NOISE, f"privacy.noise-multiplier = {noise:g} is out of the policy's bounds")
    if privacy.clip_norm > bounds.max_clip_norm:
        raise Refused(Code.POLICY_NOISE, f"privacy.clip-norm = {privacy.clip_norm:g} is above the policy's bound")


def require_small_delta(policy: SitePolicy | None, settings: Settings, num_examples: int) -> None:
    """Refuse a δ that would allow to publish a whole record of the data set: δ ≥ 1/n.

    The bound of the policy is compared, not what the run asks: a run that tries one δ after the other learns nothing.

    Raises:
        Refused: With the code of a budget beyond the policy's, which tells nothing of n.
    """
    delta = policy.record.delta if policy else settings.privacy.delta
    if settings.privacy.mode == "record" and delta * num_examples >= 1:
        raise Refused(
            Code.POLICY_BUDGET,
            f"delta = {delta:g} of the {'policy' if policy else 'run'} is not below 1/{num_examples}, one over the "
            "number of records: lower it",
        )
