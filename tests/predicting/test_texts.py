import io
from pathlib import Path

import pandas as pd
import pytest

from bora_fl.config import ConfigError
from bora_fl.predicting.texts import read_texts

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
