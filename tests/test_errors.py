"""Each wrong input of docs/errors.md ends before any client trains, in one message."""

import json
import os
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM

from bora_fl.config import ConfigError, overrides, parse
from bora_fl.deployment.doctor.preflight import preflight
from bora_fl.models import base
from bora_fl.server.run import Server

PAGE = Path(__file__).resolve().parents[1] / "docs" / "errors.md"
SERVER, EXAMPLES = (
    re.findall(r"^\| `(.+?)` \| .+? \| `(.+?)` \|$", part, re.MULTILINE)
    for part in PAGE.read_text().split("The examples themselves")
)
SOUND = {
    "model.name": "model", "adapter.num-blocks": 4, "data.name": "reviews.csv", "data.test-split": "",
    "data.partition": "iid", "run.num-rounds": 1, "run.output-dir": "out",
}  # fmt: skip
LANGUAGE = {
    "model.name": "causal", "model.task": "causal-lm", "model.max-length": 16, "adapter.target-modules": "q_proj",
    "data.name": "messages.jsonl",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tiny_causal: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a model and a table; a language model, sound and spoiled, with messages and pairs."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "model").symlink_to(tiny_model)
    (folder / "causal").symlink_to(tiny_causal)
    causal = AutoModelForCausalLM.from_pretrained(tiny_causal)
    causal.model.save_pretrained(folder / "headless")
    state = {name: tensor for name, tensor in causal.state_dict().items() if name != "lm_head.weight"}
    causal.save_pretrained(folder / "lacking", state_dict=state)
    shutil.copytree(tiny_causal, folder / "plain", ignore=lambda *_: ["chat_template.jinja"])
    messages = [{"role": "user", "content": "was it"}, {"role": "assistant", "content": "a good film"}]
    pair = {"prompt": "was it", "chosen": "very very very very good", "rejected": "very very very very bad"}
    turns = {"chosen": messages, "rejected": [*messages[:1], {"role": "assistant", "content": "a bad film"}]}
    picture = [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, messages[1] | {"content": ["good"]}]
    spoiled = {
        "numbers": {"prompt": "was it", "completion": 1},
        "quoted": {"messages": str(messages)},
        "pictures": {"messages": json.dumps(picture)},
    }
    for name, row in {"messages": {"messages": messages}, "pairs": pair, "turns": turns, **spoiled}.items():
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 40)
    texts = [{"text": "a good film", "split": split} for split in ("train", "held")]
    (folder / "texts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in texts * 40))
    rows = {"text": ["a good film", "a bad book"] * 20, "label": [1, 0] * 20}
    pd.DataFrame(rows).to_csv(folder / "reviews.csv", index=False)
    pd.DataFrame(rows | {"label": ["good", "bad"] * 20}).to_csv(folder / "named.csv", index=False)
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
    assert len(SERVER) >= 20
    begin([])


@pytest.mark.parametrize("data", ["messages.jsonl", "pairs.jsonl", "turns.jsonl"])
def test_without_their_mistakes_examples_are_learned_from(data: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    preflight(parse(SOUND | LANGUAGE | {"data.name": data}))


@pytest.mark.parametrize(("settings", "words"), EXAMPLES, ids=[row[0] for row in EXAMPLES])
def test_examples_that_nothing_can_be_learned_from(
    settings: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(folder)
    base.resolve.cache_clear()
    known = SOUND | LANGUAGE
    with pytest.raises(ConfigError) as caught:
        preflight(parse(known | overrides(settings.split(), known)))
    _check(str(caught.value), settings.split(), words, folder)


@pytest.mark.parametrize(("settings", "words"), SERVER, ids=[row[0] for row in SERVER])
def test_a_wrong_input_ends_in_one_message(settings: str, words: str, begin, folder: Path):
    pairs = settings.split()
    with pytest.raises(ConfigError) as caught:
        begin(pairs)
    _check(str(caught.value), pairs, words, folder)


def _check(message: str, pairs: list[str], words: str, folder: Path) -> None:
    """One line with the words, the key and the value."""
    assert words in message
    assert len(message.splitlines()) == 1
    assert not message.endswith(("; ", "model.*", "adapter.*"))  # one remedy, the mistake's own
    named = [pair for pair in pairs if re.search(rf"\b{re.escape(pair.partition('=')[0])}\b", message)]
    assert named or "strategy." in message
    assert any(pair.partition("=")[2].removesuffix(".0") in message for pair in pairs)
    outside = message.replace(f"{folder}{os.sep}", "")
    assert not re.search(r"/tmp|Traceback|\d{15,}", outside)
