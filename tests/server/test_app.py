"""What Flower logs of an error that a ServerApp ends in."""

import logging
from io import StringIO

import pytest

from bora_fl.config import ConfigError, parse
from bora_fl.deployment.launch import reason
from bora_fl.server.app import log_progress


def refused() -> None:
    parse({"train.batch-size": 0})


def broken() -> None:
    raise KeyError("adapter")


def logged(run, monkeypatch: pytest.MonkeyPatch) -> str:
    """The log of Flower's process of a ServerApp, which catches and logs whatever it raises."""
    log_progress()
    logger, stream = logging.getLogger("flwr"), StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s :     %(message)s"))
    monkeypatch.setattr(logger, "handlers", [handler])
    try:
        run()
    except Exception as error:
        logger.log(logging.ERROR, "%s raised an exception", "ServerApp", exc_info=error)
    return stream.getvalue()


def test_a_wrong_setting_is_one_message_without_a_traceback(monkeypatch: pytest.MonkeyPatch):
    text = logged(refused, monkeypatch)
    first, second = text.splitlines()
    assert first == "ERROR :     ServerApp raised an exception"
    assert second.startswith("bora_fl.config.groups.ConfigError: train.batch-size = 0: ")
    assert reason(text) == second  # which `bora-fl run` on a deployment shows


def test_any_other_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    text = logged(broken, monkeypatch)
    assert "in broken" in text
    assert text.splitlines()[-1] == "KeyError: 'adapter'"


def test_the_cause_of_a_refusal_is_left_out(monkeypatch: pytest.MonkeyPatch):
    def run() -> None:
        try:
            broken()
        except KeyError as error:
            raise ConfigError("data.name = 'x': no") from error

    assert len(logged(run, monkeypatch).splitlines()) == 2
