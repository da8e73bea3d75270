"""The checks of packages, strategy, data and model that a run begins with, before Flower starts; quick ones first."""

import logging
from collections.abc import Iterator

from bora_fl.config import ConfigError, Settings, extras
from bora_fl.deployment.doctor import federation
from bora_fl.deployment.doctor.finding import Finding
from bora_fl.strategies.trial import tried

log = logging.getLogger(__name__)


def preflight(settings: Settings) -> None:
    """Refuse a run that would fail for its strategy, data or model, and log what would make it worse.

    Args:
        settings: The run's settings; data and model must be on this machine.

    Raises:
        ConfigError: With a line for each finding.
    """
    extras.require_for(settings)
    tried(settings)
    failed = []
    for finding in _findings(settings):
        line = f"{finding.subject}: {finding.text}{f'; {finding.remedy}' if finding.remedy else ''}"
        if finding.level == "warn":
            log.warning("warning: %s", line)
        elif finding.level == "fail":
            failed.append(line)
    if failed:
        raise ConfigError("\n".join(failed))


def _findings(settings: Settings) -> Iterator[Finding]:
    data, labels = federation.check_data(settings)
    yield data
    if data.level != "fail":  # without its labels a classifier cannot be made
        model = federation.check_model(settings, labels)[0]
        yield model
        if model.level != "fail" and settings.model.task == "causal-lm":
            yield federation.check_examples(settings)
