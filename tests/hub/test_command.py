"""`bora-fl push` to a server on this machine that answers as the Hub does."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bora_fl.cli import cli
from bora_fl.config import ConfigError, Settings
from bora_fl.deployment.launch import LaunchError


class Hub(ThreadingHTTPServer):
    """What has been asked for, and what was committed, by path in the repository."""

    def __init__(self, refuses: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.refuses, self.repos, self.files = refuses, [], {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refuses:
            return self._answer({"error": "you may not"}, 403)
        if self.path == "/api/repos/create":
            self.server.repos.append(json.loads(body))
            return self._answer({"url": f"{self.server.url}/me/reviews"})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self._answer({"files": modes})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._answer({"commitUrl": f"{self.server.url}/me/reviews/commit/abc", "commitOid": "abc"})
        return self._answer({"errors": [], "warnings": []})  # whether the card's metadata is sound

    def _answer(self, content: dict, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
        yield server
        server.shutdown()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a finished run leaves, as far as it matters here."""
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "bora_fl.json").write_text(json.dumps({"format": 1, "round": 1, "settings": {}}))
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (adapter / "README.md").write_text("---\nlibrary_name: peft\n---\n# A card\n")
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    return tmp_path / "run"


def push(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ["push", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


@pytest.mark.parametrize("public", [False, True])
def test_the_adapter_goes_to_the_hub_and_nothing_of_the_clients(public: bool, hub: Hub, run: Path):
    text = push(str(run), "me/reviews", *(["--public"] if public else []))
    assert f"{hub.url}/me/reviews/commit/abc" in text
    assert hub.files == {path.name: path.read_bytes() for path in (run / "adapter").iterdir()}
    (made,) = hub.repos
    assert (made["organization"], made["name"]) == ("me", "reviews")
    assert made["visibility"] == ("public" if public else "private")


def test_an_exported_folder_goes_as_it_is(hub: Hub, tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    push(str(tmp_path), "me/reviews")
    assert hub.files == {"config.json": b"{}"}


def test_what_the_hub_refuses_ends_in_one_message(hub: Hub, run: Path):
    hub.refuses = True
    with pytest.raises(LaunchError, match=r"me/reviews: the Hub did not take it \(.*403.*HF_TOKEN"):
        push(str(run), "me/reviews")


def test_what_is_no_run_or_no_name_is_refused_before_anything_is_sent(hub: Hub, run: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"there is no finished run"):
        push(str(tmp_path), "me/reviews")
    with pytest.raises(ConfigError, match=r"REPO a/b/c: .*give owner/name"):
        push(str(run), "a/b/c")
    assert not hub.repos


def test_of_a_run_that_has_not_ended_nothing_goes(hub: Hub, tmp_path: Path):
    """Its folder holds a config.json, as an exported model's does, and what the clients measured."""
    (tmp_path / "config.json").write_text(json.dumps(Settings().flat()))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"there is no finished run"):
        push(str(tmp_path), "me/reviews")
    assert not hub.files
