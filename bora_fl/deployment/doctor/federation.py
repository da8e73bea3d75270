"""Run config, data and model: whether they are there and fit together, and what they will take."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bora_fl.config import ConfigError, Scalar, Settings, parse
from bora_fl.data import FetchError, labels, load_dataset
from bora_fl.data.partitions import natural_ids
from bora_fl.deployment.doctor.finding import Finding, Level

_EXAMINED = 256


@dataclass(frozen=True)
class Sizes:
    """What a run takes, as far as it can be told before it starts.

    Attributes:
        parameters: Of the base model and the adapter.
        trained: Parameters that train.
        adapter: Bytes of a checkpoint.
    """

    parameters: int
    trained: int
    adapter: int


def check_config(run_config: Mapping[str, Scalar]) -> tuple[list[Finding], Settings | None]:
    """Whether a run config can be used; every mistake is a line of its own."""
    try:
        settings = parse(run_config)
    except ConfigError as error:
        remedy = "`bora-fl config` lists the settings"
        return [Finding("config", "fail", line, remedy) for line in str(error).splitlines()], None
    changed = f"{len(run_config)} settings differ from the defaults" if run_config else "the defaults"
    return [Finding("config", "pass", changed)], settings


def check_strategy(settings: Settings) -> Finding:
    """Whether there is such a strategy that goes with the other settings; a user's own merges made-up adapters."""
    from bora_fl.strategies.trial import tried

    subject = f"strategy {settings.strategy.name}"
    try:
        return Finding(subject, "pass", tried(settings).preset.summary)
    except ConfigError as error:
        return Finding(subject, "fail", str(error), "`bora-fl strategies` lists those there are; docs/extending.md")


def check_data(settings: Settings) -> tuple[Finding, list[str] | None]:
    """Whether the data is there with its columns and labels, and the names of the logits.

    Args:
        settings: The run's settings.
    """
    subject = f"data {settings.data.name}"
    try:
        raw = load_dataset(settings.data)
        if settings.data.partition == "natural":
            natural_ids(settings.data, raw)
        labels.require(raw.train, raw.settings, settings.model, raw.label_names)
    except (ConfigError, FetchError) as error:
        return Finding(subject, "fail", str(error)), None
    test = f", {len(raw.test):,} for the central test" if raw.test is not None else ""
    text = f"{len(raw.train):,} rows to train on{test}"
    names = raw.logit_names(settings.model)
    if raw.label_names and not settings.model.kind.number:
        text += f", classes {', '.join(raw.label_names[:8])}{' ...' if len(raw.label_names) > 8 else ''}"
    if len(raw.train) < settings.train.batch_size:
        remedy = "lower train.batch-size or get more data"
        return Finding(subject, "warn", f"{text}: less than a batch of {settings.train.batch_size}", remedy), names
    return Finding(subject, "pass", text), names


def check_examples(settings: Settings) -> Finding:
    """Whether the first rows become examples that a language model can learn from.

    Args:
        settings: The run's settings, whose data and model are there.
    """
    from bora_fl.data import tokenize
    from bora_fl.data.prompts import held_out_prompts
    from bora_fl.models import load_tokenizer
    from bora_fl.models.reference import require_preferences

    subject, raw = f"examples of {settings.data.name}", load_dataset(settings.data)
    rows = min(len(raw.train), _EXAMINED)
    try:
        if raw.settings.format == "preference":
            require_preferences(settings)
        tokenizer = load_tokenizer(settings.model)
        found = tokenize(raw.train.select(range(rows)), raw.settings, settings.model, tokenizer, raw.label_names)
        if settings.run.generate_every and raw.test is not None:
            held_out_prompts(raw.test, raw.settings, tokenizer, 1)
    except (ConfigError, ValueError, OSError) as error:
        return Finding(subject, "fail", " ".join(str(error).split()), _remedy(error, "correct data.* or model.*"))
    text = f"format {raw.settings.format}, {found.lengths.mean():.0f} tokens each"
    if found.cut:
        text += f"; {found.cut} of the first {rows} are longer than model.max-length = {settings.model.max_length}"
    level: Level = "warn" if 2 * found.cut > rows else "pass"
    return Finding(subject, level, text, "raise model.max-length" if level == "warn" else "")


def check_model(settings: Settings, label_names: list[str] | None) -> tuple[Finding, Sizes | None]:
    """Whether the base model loads, on a device without memory, and takes the adapter.

    Args:
        settings: The run's settings.
        label_names: Class names, for a classifier's head.
    """
    import torch
    from transformers import AutoConfig

    from bora_fl.models import FederatedModel, resolve
    from bora_fl.models.base import auto_class, require_language_model, require_whole

    subject = f"model {settings.model.name}"
    try:
        source = resolve(settings.model.name)
        config: Any = AutoConfig.from_pretrained(source, revision=settings.model.revision or None)
        if label_names:
            config.num_labels = len(label_names)
        if settings.model.task == "causal-lm":
            require_language_model(settings.model)
            require_whole(settings.model)
        with torch.device("meta"):
            base = auto_class(settings.model).from_config(config)
            model = FederatedModel(base, settings.adapter, settings.model, settings.run.seed)
    except (ConfigError, ValueError, OSError) as error:
        remedy = _remedy(error, "fetch the model, or correct model.* and adapter.*")
        text = " ".join(str(error).split())
        return Finding(subject, "fail", text[:300] if remedy else text, remedy), None
    except (NotImplementedError, RuntimeError) as error:  # some methods compute on the weights when they are made
        text = f"cannot be examined without its weights ({type(error).__name__})"
        return Finding(subject, "warn", text, "the first round will tell"), None
    parameters, trained = sum(p.numel() for p in model.model.parameters()), model.num_trained
    sizes = Sizes(parameters, trained, 4 * trained)
    text = (
        f"{parameters / 1e6:.1f} M parameters, {trained / 1e6:.2f} M train, {4 * trained / 1e6:.2f} MB travel each way"
    )
    return Finding(subject, "pass", text), sizes


def _remedy(error: Exception, otherwise: str) -> str:
    """A mistake in the settings names its own remedy."""
    return "" if isinstance(error, ConfigError) else otherwise


def result_folder(settings: Settings) -> Path:
    """Where the server writes."""
    return Path(settings.run.output_dir).expanduser().resolve()
