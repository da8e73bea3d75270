import pytest

from bora_fl.granted import grant, granted


def test_what_is_granted_is_read_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_JOB_ID", raising=False)
    assert (granted("CPU"), granted("GPU")) == (0, 0)
    for name, value in grant(3, 0.25).items():
        monkeypatch.setenv(name, value)
    assert (granted("CPU"), granted("GPU")) == (3, 0.25)
