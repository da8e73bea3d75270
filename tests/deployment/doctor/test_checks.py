import datetime
import http.server
import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from transformers import AutoConfig, AutoModelForCausalLM

from bora_fl.deployment.certificates import make_client, make_server, make_site, sign
from bora_fl.deployment.doctor import federation, machine, network, registration, secrets, software
from bora_fl.planning.memory import estimate

NOW = datetime.datetime.now(datetime.UTC)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    make_server(folder, ["localhost", "127.0.0.1", "*.example.org"])
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    make_server(folder, ["localhost", "127.0.0.1"])
    return folder


answers = [(400, 2003)]


@pytest.fixture
def superlink(server: Path) -> Iterator[int]:
    """A port that answers over TLS as a SuperLink's health page does."""

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            """What a SuperLink says of a node whose key it knows, or not, or of a bad proof."""
            self.rfile.read(int(self.headers["content-length"]))
            status, code = answers[0]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps({"code": code, "public_message": "refused", "detail": "refused"}).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server / "server.pem", server / "server.key")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health) as running:
        running.handle_error = lambda *_: None  # a client that turns away is what is tested
        running.socket = context.wrap_socket(running.socket, server_side=True)
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running.server_address[1]
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("answer", "level", "words"),
    [
        ((400, 2003), "pass", "is registered"),
        ((412, 2004), "fail", "is not registered"),
        ((401, None), "fail", "not accepted"),
        ((404, None), "warn", "not known"),
    ],
)
def test_a_key_is_called_registered_only_if_the_server_says_so(
    answer: tuple[int, int | None], level: str, words: str, superlink: int, server: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setitem(globals(), "answers", [answer])
    key = make_site(tmp_path, "a")[0]
    found = registration.check_registered("localhost", superlink, server / "ca.crt", key)
    assert (found.level, words in found.text) == (level, True), found
    assert "registered" not in secrets.check_site_key(key).text


# --- versions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("installed", "level"), [("1.41.0", "pass"), ("1.43.0", "fail"), (None, "fail")])
def test_a_requirement(installed: str | None, level: str):
    assert software.check_requirement(Requirement("flwr[simulation]>=1.41,<1.43"), installed).level == level


@pytest.mark.parametrize(("version", "level"), [("3.11.7", "pass"), ("3.10.9", "fail")])
def test_python(version: str, level: str):
    assert software.check_python(version, ">=3.11").level == level


def test_this_environment_is_right():
    assert [finding.level for finding in software.check_versions()] == ["pass"]


# --- certificates and keys -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("days", "level"), [(0, "pass"), (340, "warn"), (400, "fail"), (-1, "fail")])
def test_expiry(days: int, level: str, server: Path):
    certificate = secrets.load_certificate(server / "server.pem")
    assert secrets.check_expiry("certificate", certificate, NOW + datetime.timedelta(days=days)).level == level


@pytest.mark.parametrize(
    ("host", "level"),
    [("localhost", "pass"), ("127.0.0.1", "pass"), ("fed.example.org", "pass"), ("a.b.example.org", "fail")],
)
def test_names(host: str, level: str, server: Path):
    assert secrets.check_name(secrets.load_certificate(server / "server.pem"), host).level == level


def test_chain_and_pair(server: Path, other: Path):
    certificate, authority = (secrets.load_certificate(server / name) for name in ("server.pem", "ca.crt"))
    assert secrets.check_chain(certificate, authority).level == "pass"
    assert secrets.check_chain(certificate, secrets.load_certificate(other / "ca.crt")).level == "fail"
    assert secrets.check_pair(certificate, server / "server.key").level == "pass"
    assert secrets.check_pair(certificate, other / "server.key").level == "fail"
    assert secrets.check_pair(certificate, server / "ca.crt").level == "fail"


def test_a_missing_or_wrong_certificate_is_a_finding(server: Path, tmp_path: Path):
    assert secrets.load_certificate(tmp_path / "none.pem").level == "fail"
    assert "not its key" in secrets.load_certificate(server / "server.key").remedy


def test_a_site_key(tmp_path: Path, server: Path):
    key, _, secret = make_site(tmp_path, "a")
    found = secrets.check_site_key(key)
    assert found.level == "pass"
    assert "authenticates" not in found.text  # which nobody knows who has not asked the server
    key.chmod(0o644)
    assert secrets.check_site_key(key).level == "warn"
    assert secrets.check_site_key(server / "server.key").level == "fail"  # PKCS 8, not OpenSSH
    assert secrets.check_site_key(tmp_path / "none").level == "fail"
    assert secrets.check_private(secret).level == "pass"
    secret.write_bytes(b"")
    assert secrets.check_private(secret).level == "fail"


@pytest.mark.parametrize(("mode", "level"), [(0o600, "pass"), (0o644, "warn"), (0o640, "warn")])
def test_what_others_may_read(mode: int, level: str, tmp_path: Path):
    database = tmp_path / "state.db"
    assert secrets.check_shared(database).level == "pass"  # not there yet
    database.touch()
    database.chmod(mode)
    assert secrets.check_shared(database).level == level


# --- network ---------------------------------------------------------------------------------------------------------


def test_a_superlink_that_answers_and_its_clock(superlink: int, server: Path):
    finding, answer = network.check_reachable("127.0.0.1", superlink, server / "ca.crt")
    assert finding.level == "pass"
    assert abs(answer.skew) < 3
    assert network.check_clock(answer.skew).level in {"pass", "warn"}


def test_a_superlink_of_another_authority(superlink: int, other: Path):
    finding, answer = network.check_reachable("127.0.0.1", superlink, other / "ca.crt")
    assert (finding.level, answer) == ("fail", None)
    assert "trusted" in finding.text


def test_a_proxy_that_asks_for_a_certificate(server: Path, tmp_path: Path):
    make_client(tmp_path, "berlin")
    client = sign(tmp_path / "berlin.csr", "site", server), tmp_path / "client.key"

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.connection.getpeercert() else 400)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server / "server.pem", server / "server.key")
    context.load_verify_locations(server / "ca.crt")
    context.verify_mode = ssl.CERT_OPTIONAL
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as running:
        running.socket = context.wrap_socket(running.socket, server_side=True)
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        port = running.server_address[1]
        with_it, _ = network.check_reachable("127.0.0.1", port, server / "ca.crt", client)
        without, _ = network.check_reachable("127.0.0.1", port, server / "ca.crt")
        running.shutdown()
        thread.join()
    assert with_it.level == "pass"
    assert (without.level, "client's certificate" in without.text) == ("fail", True)


def test_nobody_there_and_no_such_name(server: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        finding, _ = network.check_reachable("127.0.0.1", free.getsockname()[1], server / "ca.crt")
    assert (finding.level, "refused" in finding.text) == ("fail", True)
    assert network.check_reachable("no-such-host.invalid", 443, None)[0].level == "fail"


@pytest.mark.parametrize(
    ("skew", "level"),
    [(0.0, "pass"), (20.0, "pass"), (100.0, "warn"), (310.0, "fail"), (-3.0, "warn"), (-7.0, "fail"), (None, "warn")],
)
def test_clock(skew: float | None, level: str):
    assert network.check_clock(skew).level == level


# --- machine ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "level"), [(10e9, "pass"), (2.5e9, "warn"), (0.5e9, "fail")])
def test_space(free: float, level: str):
    assert machine.judge_space("results", free, 1e9).level == level


@pytest.mark.parametrize(("free", "level"), [(1.4e9, "pass"), (1.3e9, "warn"), (0.9e9, "warn"), (0.7e9, "fail")])
def test_memory(free: float, level: str):
    assert machine.judge_memory("cpu", free, 1e9).level == level


def test_memory_is_what_planning_estimates(tiny_config, monkeypatch: pytest.MonkeyPatch):
    _, settings = federation.check_config(tiny_config)
    config = AutoConfig.from_pretrained(tiny_config["model.name"])
    compared = []
    monkeypatch.setattr(machine, "judge_memory", lambda device, free, needed: compared.append(needed))
    machine.check_memory(settings, ["bad", "good"])
    assert compared == [estimate(settings, config, ["bad", "good"]).total]


def test_memory_that_cannot_be_estimated_is_said_to_be_unknown(tiny_config, monkeypatch: pytest.MonkeyPatch):
    def computes(*_: object) -> None:
        raise TypeError("a model that computes on values")

    monkeypatch.setattr(machine, "estimate", computes)
    _, settings = federation.check_config(tiny_config)
    finding = machine.check_memory(settings, ["bad", "good"])
    assert (finding.level, finding.text) == (
        "warn",
        "what training takes cannot be estimated for this model (TypeError)",
    )


def test_folders(tmp_path: Path):
    assert machine.check_folder("results in", tmp_path / "deep" / "down", 1).level in {"pass", "warn"}
    assert not (tmp_path / "deep").exists()
    (tmp_path / "file").write_text("")
    assert machine.check_folder("results in", tmp_path / "file" / "below", 1).level == "fail"
    assert machine.check_folder("results in", tmp_path, 1e18).level == "fail"


def test_cores():
    cores = len(os.sched_getaffinity(0))
    assert machine.check_cores(cores).level == "pass"
    assert machine.check_cores(cores + 1).level == "warn"


# --- the federation's settings ---------------------------------------------------------------------------------------


def test_every_mistake_in_the_config_is_a_line():
    findings, settings = federation.check_config({"run.num-round": 1, "train.momentun": 2.0})
    assert settings is None
    assert [finding.level for finding in findings] == ["fail", "fail"]


@pytest.mark.parametrize(
    ("name", "level", "words"),
    [
        ("refactor", "pass", ""),
        ("fedavgg", "fail", "did you mean fedavg"),
        ("tests.strategies.test_trial:raising", "fail", "in _helper: IndexError"),
    ],
)
def test_a_strategy(name: str, level: str, words: str):
    _, settings = federation.check_config({"strategy.name": name})
    finding = federation.check_strategy(settings)
    assert finding.level == level
    assert words in finding.text


def test_data_and_model(tiny_config):
    _, settings = federation.check_config(tiny_config)
    data, labels = federation.check_data(settings)
    assert (data.level, labels) == ("pass", ["0", "1"])
    model, sizes = federation.check_model(settings, labels)
    assert model.level == "pass"
    assert 0 < sizes.trained < sizes.parameters


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({"data.name": "missing.parquet"}, "fail", "missing.parquet"),
        ({"data.text-column": "txt"}, "fail", "txt"),
        ({"data.partition-by": "silo"}, "fail", "set data.partition to iid"),
        ({"data.label-column": ""}, "fail", "name the column of the classes"),
        ({"train.batch-size": 1000}, "warn", "batch"),
    ],
)
def test_data_that_does_not_fit(change, level: str, words: str, tiny_config):
    _, settings = federation.check_config(tiny_config | change)
    finding, _ = federation.check_data(settings)
    assert finding.level == level
    assert words in finding.text


@pytest.mark.parametrize(
    "change", [{"model.name": "embedded:nothing"}, {"adapter.num-blocks": 3}, {"adapter.target-modules": "nowhere"}]
)
def test_a_model_that_does_not_fit(change, tiny_config):
    _, settings = federation.check_config(tiny_config | change)
    finding, sizes = federation.check_model(settings, ["bad", "good"])
    assert (finding.level, sizes) == ("fail", None)


def test_an_encoder_is_no_language_model(tiny_config):
    causal = {"model.task": "causal-lm", "data.label-column": ""}
    _, settings = federation.check_config(tiny_config | causal)
    finding, sizes = federation.check_model(settings, None)
    assert (finding.level, sizes) == ("fail", None)
    assert "bert is an encoder" in finding.text


def test_a_language_model_without_its_head_is_seen_before_it_is_loaded(tiny_config, tiny_causal, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_causal)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    causal = {"model.name": str(tmp_path), "model.task": "causal-lm", "adapter.target-modules": "q_proj"}
    _, settings = federation.check_config(tiny_config | causal | {"data.label-column": ""})
    finding, sizes = federation.check_model(settings, None)
    assert (finding.level, sizes) == ("fail", None)
    assert "its files lack lm_head.weight" in finding.text


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({}, "pass", "format text, 7 tokens each"),
        ({"model.max-length": 4}, "warn", "240 of the first 240 are longer than model.max-length = 4"),
        ({"model.max-length": 1}, "fail", "none of 240 examples has a token to learn"),
    ],
)
def test_examples_that_a_language_model_learns_from(change, level: str, words: str, tiny_config, tiny_causal: Path):
    causal = {"model.name": str(tiny_causal), "model.task": "causal-lm", "data.label-column": ""}
    _, settings = federation.check_config(tiny_config | causal | change)
    finding = federation.check_examples(settings)
    assert finding.level == level
    assert words in finding.text


def test_a_model_that_cannot_be_examined_is_left_to_the_run(tiny_config, monkeypatch: pytest.MonkeyPatch):
    def computes(*_: object) -> None:
        raise RuntimeError("a method that computes on the weights when it is made")

    monkeypatch.setattr("bora_fl.models.FederatedModel", computes)
    _, settings = federation.check_config(tiny_config)
    finding, sizes = federation.check_model(settings, ["bad", "good"])
    assert (finding.level, sizes) == ("warn", None)


def test_the_clock_is_held_to_what_flower_asks():
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

    assert (network.AHEAD, network.BEHIND) == (SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE)
