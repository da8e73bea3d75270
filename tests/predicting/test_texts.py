import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import AutoTokenizer

from bora_fl.config import ConfigError, DataSettings
from bora_fl.predicting.dialogs import to_continue
from bora_fl.predicting.texts import Conversation, read_texts

TEXTS = ["one, two", "three\nfour", 'five "six"']


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_a_column_of_a_table_is_read_whole_and_in_order(suffix: str, tmp_path: Path):
    path, frame = tmp_path / f"texts.{suffix}", pd.DataFrame({"id": range(3), "body": TEXTS})
    if suffix == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif suffix == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
    assert read_texts(str(path), "body") == TEXTS
    with pytest.raises(ConfigError, match="no column 'text' among id, body; name one with --text-column"):
        read_texts(str(path), "text")


def test_lines_are_texts_or_json_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = 'a film\n\n{"text": "a \\"book\\"", "id": 3}\n  [sic] it is \n'
    (tmp_path / "texts.txt").write_text(lines)
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    expected = ["a film", 'a "book"', "[sic] it is"]
    assert read_texts(str(tmp_path / "texts.txt"), "text") == read_texts("-", "text") == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 3}', "line 1: text = 3 is no text"),
        ('{"texts": "a"}', "line 1: there is no column 'text' among texts"),
        ('{"text": ', "line 1: it begins as a JSON object"),
    ],
)
def test_a_line_that_is_no_text_is_named(line: str, message: str, tmp_path: Path):
    (tmp_path / "texts").write_text(line)
    with pytest.raises(ConfigError, match=message):
        read_texts(str(tmp_path / "texts"), "text")


def test_lines_in_windows_encodings(tmp_path: Path):
    path = tmp_path / "texts.txt"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a film"}\r\nsad\r\n')
    assert read_texts(str(path), "text") == ["a film", "sad"]
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(ConfigError, match=r"texts\.txt: it is not UTF-8 .*iconv"):
        read_texts(str(path), "text")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nothing\.csv: there is no such file"):
        read_texts(str(tmp_path / "nothing.csv"), "text")


ASKED = [{"role": "user", "content": "was it"}]
TOOLS = [{"type": "function", "function": {"name": "film"}}]


def test_conversations_in_every_form_are_the_same(tmp_path: Path):
    parts = [{"role": "user", "content": [{"type": "text", "text": "was "}, {"type": "text", "text": "it"}]}]
    shared = [{"from": "human", "value": "was it"}]
    for number, words in enumerate((ASKED, parts, shared, json.dumps(ASKED))):
        line = json.dumps({"messages": words})
        for name in (f"{number}.txt", f"{number}.jsonl"):
            (tmp_path / name).write_text(line + "\n")
            assert read_texts(str(tmp_path / name), "messages", dialogs=True) == [Conversation(ASKED)]
    pd.DataFrame({"messages": [json.dumps(ASKED), "12"]}).to_csv(tmp_path / "chats.csv", index=False)
    assert read_texts(str(tmp_path / "chats.csv"), "messages", dialogs=True) == [Conversation(ASKED), "12"]
    (tmp_path / "numbers.csv").write_text("messages\n007\n")
    assert read_texts(str(tmp_path / "numbers.csv"), "messages") == ["007"]


@pytest.mark.parametrize("name", ["asked.txt", "asked.jsonl"])
def test_functions_are_told_to_the_model(name: str, tiny_causal: Path, tmp_path: Path):
    (tmp_path / name).write_text(json.dumps({"messages": ASKED, "tools": TOOLS}) + "\n")
    found = read_texts(str(tmp_path / name), "messages", dialogs=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool['function']['name'] }} {% endfor %}" + str(
        tokenizer.chat_template
    )
    rows, ids = to_continue(tokenizer, [*found, ASKED], DataSettings(format="messages"))
    alone = "<|user|> was it <|end|> <|assistant|>"
    assert [tokenizer.decode(row) for row in ids] == [f"film {alone}", alone]
    assert rows == [{"messages": ASKED}] * 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("was \ud800 it", "line 1: messages holds half a character"),
        ([{"role": "user", "content": "was \ud800 it"}], "line 1: messages holds half a character"),
        ([], "holds nothing to answer"),
        ([{"role": "assistant", "content": "it"}], "holds nothing to answer"),
        ([{"content": "it"}], "a message without a role"),
        ([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "line 1: .* a part of type 'image'"),
    ],
)
def test_what_no_model_can_answer_is_named(value: Any, message: str, tmp_path: Path):
    (tmp_path / "asked").write_text(json.dumps({"messages": value}))
    with pytest.raises(ConfigError, match=message):
        read_texts(str(tmp_path / "asked"), "messages", dialogs=True)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_standard_input_in_another_encoding_is_named(errors: str, monkeypatch: pytest.MonkeyPatch):
    given = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf8", errors=errors)
    monkeypatch.setattr("sys.stdin", given)
    with pytest.raises(ConfigError, match=r"standard input: it is not UTF-8 .*iconv"):
        read_texts("-", "text")


def test_a_prompt_goes_on_with_what_it_is_about(tmp_path: Path):
    lines = [{"instruction": "was it", "input": "the film"}, {"instruction": "was it", "input": ""}]
    (tmp_path / "asked.txt").write_text("\n".join(map(json.dumps, lines)) + '\n{"instruction": "was it"}\nwas it\n')
    expected = ["was it\n\nthe film", "was it", "was it", "was it"]
    assert read_texts(str(tmp_path / "asked.txt"), "instruction", context="input") == expected
    pd.DataFrame(lines).to_csv(tmp_path / "asked.csv", index=False)
    assert read_texts(str(tmp_path / "asked.csv"), "instruction", context="input") == expected[:2]
    assert read_texts(str(tmp_path / "asked.csv"), "input", context="none") == ["the film", ""]
    (tmp_path / "asked.txt").write_text('{"instruction": "was it", "input": 3}')
    with pytest.raises(ConfigError, match="line 1: input = 3 is no text"):
        read_texts(str(tmp_path / "asked.txt"), "instruction", context="input")
