import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from bora_fl.client.worker.servicer import SiteWorker
from bora_fl.config import ConfigError
from bora_fl.tracking.prometheus import exposition, serving


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def get(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        return answer.read().decode()


def test_the_text_format():
    text = exposition({"strategy/merge_error": 0.5, "client/3/train-loss": 1, "client/4/train-loss": 2, "round": 7})
    assert text.splitlines() == [
        "# TYPE bora_fl_client_train_loss gauge",
        'bora_fl_client_train_loss{client="3"} 1.0',
        'bora_fl_client_train_loss{client="4"} 2.0',
        "# TYPE bora_fl_round gauge",
        "bora_fl_round 7.0",
        "# TYPE bora_fl_strategy_merge_error gauge",
        "bora_fl_strategy_merge_error 0.5",
    ]


def test_it_is_served_on_loopback_meanwhile_and_of_the_moment():
    port, values = free_port(), {"round": 1.0}
    with serving(port, lambda: values, "run.metrics-port ="):
        assert "bora_fl_round 1.0" in get(port)
        values["round"] = 2.0
        assert "bora_fl_round 2.0" in get(port)
        with pytest.raises(urllib.error.HTTPError):
            get(port, "/")
        with (
            pytest.raises(ConfigError, match=rf"run\.metrics-port = {port}: .*free port"),
            serving(port, dict, "run.metrics-port ="),
        ):
            pass
    with pytest.raises(OSError, match="refused"):
        get(port)


def test_nothing_is_served_without_a_port(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bora_fl.tracking.prometheus.ThreadingHTTPServer", None)
    with serving(0, dict, "x"):
        pass


def test_a_worker_counts(tmp_path: Path):
    text = exposition(SiteWorker(None).numbers())
    assert "bora_fl_worker_trained 0.0" in text
    assert "bora_fl_worker_busy 0.0" in text
