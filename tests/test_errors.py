"""Each wrong input of docs/errors.md ends before any client trains, in one message."""

import os
import re
from pathlib import Path

import pandas as pd
import pytest

from bora_fl.config import ConfigError, overrides, parse
from bora_fl.models import base
from bora_fl.server.run import Server

PAGE = Path(__file__).resolve().parents[1] / "docs" / "errors.md"
ROWS = re.findall(r"^\| `(.+?)` \| .+? \| `(.+?)` \|$", PAGE.read_text(), re.MULTILINE)
SOUND = {
    "model.name": "model", "adapter.num-blocks": 4, "data.name": "reviews.csv", "data.test-split": "",
    "data.partition": "iid", "run.num-rounds": 1, "run.output-dir": "out",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a model and a table."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "model").symlink_to(tiny_model)
    rows = {"text": ["a good film", "a bad book"] * 20, "label": [1, 0] * 20}
    pd.DataFrame(rows).to_csv(folder / "reviews.csv", index=False)
    (folder / "transposed.py").write_text("def rule(layer):\n    return layer.current.B @ layer.current.B\n")
    return folder


@pytest.fixture
def begin(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """All that a run does before it asks a client for anything."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base.resolve.cache_clear()

    def begin(pairs: list[str]) -> None:
        server = Server(parse(SOUND | overrides(pairs)))
        server.folder.mkdir(exist_ok=True)
        server.on_start(2)

    return begin


def test_there_are_twenty_and_without_them_a_run_begins(begin):
    assert len(ROWS) >= 20
    begin([])


@pytest.mark.parametrize(("settings", "words"), ROWS, ids=[row[0] for row in ROWS])
def test_a_wrong_input_ends_in_one_message(settings: str, words: str, begin, folder: Path):
    pairs = settings.split()
    with pytest.raises(ConfigError) as caught:
        begin(pairs)
    message = str(caught.value)
    assert words in message
    assert len(message.splitlines()) == 1
    named = [pair for pair in pairs if re.search(rf"\b{re.escape(pair.partition('=')[0])}\b", message)]
    assert named or "strategy." in message
    assert any(pair.partition("=")[2].removesuffix(".0") in message for pair in pairs)
    outside = message.replace(f"{folder}{os.sep}", "")
    assert not re.search(r"/tmp|Traceback|\d{15,}", outside)
