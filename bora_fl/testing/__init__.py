"""The laws that strategies keep, for the tests of one's own. Needs no test framework.

import pytest
from bora_fl.testing import LAWS, check

@pytest.mark.parametrize("law", LAWS)
def test_it_keeps_the_laws(law):
    check("my_pkg.mine:halfway", law)
"""

from bora_fl.testing.fleets import FLEETS, Federation
from bora_fl.testing.laws import LAWS, check

__all__ = ["FLEETS", "LAWS", "Federation", "check"]
