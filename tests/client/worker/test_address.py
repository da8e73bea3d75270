from pathlib import Path

import pytest

from bora_fl.client.worker.address import Address, WorkerSettings, make_token, read_token
from bora_fl.config import ConfigError


@pytest.mark.parametrize("text", ["unix:/run/bora/worker.sock", "tcp:127.0.0.1:7117", "tcp:::1:7117"])
def test_an_address_reads_back(text: str):
    assert str(Address.read(text)) == text


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("", "write unix:"),
        ("/run/worker.sock", "write unix:"),
        ("unix:", "write unix:"),
        ("tcp:127.0.0.1", "write unix:"),
        ("tcp:127.0.0.1:70000", "write unix:"),
        ("tcp:0.0.0.0:7117", "127.0.0.1"),
        ("tcp:worker.example.org:7117", "127.0.0.1"),
        ("unix:/" + "x" * 107, "shorten"),
    ],
)
def test_an_unusable_address_is_refused_with_a_remedy(text: str, remedy: str):
    with pytest.raises(ConfigError, match=remedy):
        Address.read(text)


def test_without_the_key_there_is_no_worker():
    assert WorkerSettings.read({"partition-id": 0}) is None


def test_the_keys_are_read():
    config = {"worker": "tcp:localhost:7117", "worker-token-file": "/etc/token", "worker-wait": 5}
    expected = WorkerSettings(Address(host="127.0.0.1", port=7117), Path("/etc/token"), 5.0)
    assert WorkerSettings.read(config) == expected


@pytest.mark.parametrize("extra", [{}, {"worker-token-file": "/t", "worker-wait": -1}])
def test_a_port_without_a_token_and_a_negative_wait_are_refused(extra):
    with pytest.raises(ConfigError, match=r"token|seconds"):
        WorkerSettings.read({"worker": "tcp:127.0.0.1:7117", **extra})


def test_a_token_is_its_owners_alone(tmp_path: Path):
    file = tmp_path / "token"
    make_token(file)
    assert file.stat().st_mode & 0o777 == 0o600
    token = read_token(file)
    make_token(file)
    assert read_token(file) == token  # a restart keeps it
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_token(file)
