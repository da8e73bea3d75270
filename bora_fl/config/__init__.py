"""One typed view of the run config, checked once.

Flower hands ServerApp and ClientApps a flat mapping of ``group.key`` to bool, int, float or str. `parse` turns it into
a frozen `Settings`; whatever is wrong ends in one `ConfigError` whose lines name the key, its value and the remedy.
"""

from bora_fl.config import extensions, extras
from bora_fl.config.federation_file import FEDERATION_FILE, Federation, federation_text, read_federation
from bora_fl.config.groups import (
    AdapterSettings,
    ConfigError,
    DataSettings,
    HeadSettings,
    ModelSettings,
    PrivacySettings,
    RunSettings,
    Scalar,
    StrategySettings,
    TrainSettings,
)
from bora_fl.config.run_config import describe, meaning, overrides, parse, read_config, suggest
from bora_fl.config.settings import Settings

__all__ = [
    "FEDERATION_FILE",
    "AdapterSettings",
    "ConfigError",
    "DataSettings",
    "Federation",
    "HeadSettings",
    "ModelSettings",
    "PrivacySettings",
    "RunSettings",
    "Scalar",
    "Settings",
    "StrategySettings",
    "TrainSettings",
    "describe",
    "extensions",
    "extras",
    "federation_text",
    "meaning",
    "overrides",
    "parse",
    "read_config",
    "read_federation",
    "suggest",
]
