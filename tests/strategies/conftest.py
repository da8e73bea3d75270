"""Fleets and dense oracles for the tests of strategies."""

from dataclasses import replace
from types import ModuleType

import pytest

from bora_fl.testing import fleets as made_up
from bora_fl.testing.fleets import FLEETS, Federation


@pytest.fixture
def dense() -> ModuleType:
    """Dense oracles and distances."""
    return made_up


@pytest.fixture
def fleets() -> dict[str, Federation]:
    return {name: replace(fleet) for name, fleet in FLEETS.items()}
