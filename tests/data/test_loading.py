"""Any local data set reads the same; what cannot serve ends in a message that names key, value and remedy."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bora_fl.config import ConfigError, DataSettings
from bora_fl.data import files, load_dataset
from tests.data.conftest import load_for

ROWS: dict[str, list[Any]] = {
    "text": ["one, two", 'say "hi"\nto all', "NA", "snow", "null", "ünïcode"],
    "label": ["x", "y", "x", "y", "z", "x"],
    "split": ["train", "train", "train", "train", "test", "test"],
}


def as_csv(path: Path, separator: str = ",") -> Path:
    quoted = [['"' + str(v).replace('"', '""') + '"' for v in row] for row in zip(*ROWS.values(), strict=True)]
    path.write_text("\n".join([separator.join(ROWS), *map(separator.join, quoted)]), encoding="utf8")
    return path


def records() -> list[dict[str, Any]]:
    return [dict(zip(ROWS, row, strict=True)) for row in zip(*ROWS.values(), strict=True)]


def as_jsonl(path: Path) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in records()), encoding="utf8")
    return path


def as_json(path: Path) -> Path:
    path.write_text(json.dumps(records(), indent=1), encoding="utf8")
    return path


def as_parquet(path: Path, table: pa.Table | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table or pa.table(ROWS), path)
    return path


def as_folder(path: Path) -> Path:
    table = pa.table(ROWS).drop_columns("split")
    as_parquet(path / "data" / "train-00000-of-00002.parquet", table.slice(0, 3))
    as_parquet(path / "data" / "train-00001-of-00002.parquet", table.slice(3, 1))
    as_parquet(path / "data" / "test-00000-of-00001.parquet", table.slice(4))
    return path


def as_folder_of_parts(path: Path) -> Path:
    as_parquet(path / "a.parquet", pa.table(ROWS).slice(0, 3))
    as_parquet(path / "b.parquet", pa.table(ROWS).slice(3))
    return path


def as_saved(path: Path) -> Path:
    data = datasets.Dataset.from_dict({k: v for k, v in ROWS.items() if k != "split"})
    splits = {"train": data.select(range(4)), "test": data.select(range(4, 6))}
    datasets.DatasetDict(splits).save_to_disk(path)
    return path


FORMATS: dict[str, Callable[[Path], Path]] = {
    "d.csv": as_csv,
    "d.tsv": lambda path: as_csv(path, "\t"),
    "d.jsonl": as_jsonl,
    "lines.json": as_jsonl,
    "list.json": as_json,
    "d.parquet": as_parquet,
    "by_split": as_folder,
    "parts": as_folder_of_parts,
    "saved": as_saved,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_the_same(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = FORMATS[name](tmp_path / name)
    capfd.readouterr()
    raw = load_dataset(DataSettings(name=str(path)))
    assert raw.label_names == ["x", "y", "z"]
    assert raw.train["text"][:] == ROWS["text"][:4]
    assert raw.train["label"][:] == [0, 1, 0, 1]
    assert raw.test is not None
    assert raw.test["text"][:] == ROWS["text"][4:]
    assert raw.test["label"][:] == [2, 0]
    assert capfd.readouterr() == ("", "")


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    settings = DataSettings(name=str(as_parquet(tmp_path / "d.parquet")))
    first = load_dataset(settings)
    assert load_dataset(settings) is first
    as_parquet(tmp_path / "d.parquet", pa.table(ROWS).slice(1))
    assert len(load_dataset(settings).train) == 3


def test_a_change_that_keeps_the_size_is_seen(tmp_path: Path) -> None:
    settings = DataSettings(name=str(tmp_path / "d.csv"), test_split="")
    (tmp_path / "d.csv").write_text("text,label\nsun,a\nsea,b\n")
    assert load_dataset(settings).train["text"][:] == ["sun", "sea"]
    (tmp_path / "d.csv").write_text("text,label\nfog,a\nsea,b\n")
    os.utime(tmp_path / "d.csv", (1, 1))
    assert load_dataset(settings).train["text"][:] == ["fog", "sea"]


def test_lines_inside_csv_cells_survive_long_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bora_fl.data.mapped.PIECE_BYTES", 256)
    texts = [f"{i}\n{'word ' * (i % 7)}end\n" for i in range(200)]
    rows = "".join(f'"{text}",{"ab"[i % 2]}\n' for i, text in enumerate(texts))
    (tmp_path / "d.csv").write_text("text,label\n" + rows)
    assert load_dataset(DataSettings(name=str(tmp_path / "d.csv"), test_split="")).train["text"][:] == texts


def test_without_a_test_split_there_is_no_test_set(tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "d.parquet", pa.table(ROWS).drop_columns("split"))
    raw = load_dataset(DataSettings(name=str(path), test_split=""))
    assert raw.test is None
    assert len(raw.train) == 6


@pytest.mark.parametrize(
    ("values", "names", "codes"),
    [
        ([5, 1, None, 3, 1, 5], ["1", "3", "5"], [2, 0, 1, 0, 2]),
        ([5.0, 1.0, float("nan"), 3.0, None, 5.0], ["1", "3", "5"], [2, 0, 1, 2]),
        ([-1, 1, 1, -1, 1, 1], ["-1", "1"], [0, 1, 1, 0, 1, 1]),
        ([True, False, None, True, True, True], ["False", "True"], [1, 0, 1, 1, 1]),
        (["b", "a", None, "b", "c", "a"], ["a", "b", "c"], [1, 0, 1, 2, 0]),
        (pa.array(["b", "a", None, "b", "c", "a"]).dictionary_encode(), ["a", "b", "c"], [1, 0, 1, 2, 0]),
        (pa.array(["b", "a", None, "b", "c", "a"], pa.string_view()), ["a", "b", "c"], [1, 0, 1, 2, 0]),
        (pa.array([5, 1, None, 3, 1, 5], pa.uint8()), ["1", "3", "5"], [2, 0, 1, 0, 2]),
    ],
)
def test_labels_become_classes_in_sorted_order(values: Any, names: list[str], codes: list[int], tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "d.parquet", pa.table({"text": list("uvwxyz"), "label": values}))
    raw = load_dataset(DataSettings(name=str(path), test_split=""))
    assert (raw.label_names, raw.train["label"][:]) == (names, codes)


def test_class_names_and_order_of_a_class_label_are_kept(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["good", "bad", "odd"])}
    )
    table = pa.table({"text": list("abcd"), "label": [1, 0, -1, 1]}, schema=features.arrow_schema)
    raw = load_dataset(DataSettings(name=str(as_parquet(tmp_path / "d.parquet", table)), test_split=""))
    assert raw.label_names == ["good", "bad", "odd"]
    assert raw.train["label"][:] == [1, 0, 1]


def test_incomplete_rows_are_left_out(tmp_path: Path) -> None:
    table = pa.table({"q": ["a", None, "  ", "d", "e", "f"], "a": ["A", "B", "C", "", None, "F"], "label": [None] * 6})
    path = as_parquet(tmp_path / "d.parquet", table)
    raw = load_dataset(DataSettings(name=str(path), test_split="", text_column="q", response_column="a"))
    assert raw.label_names is None
    assert raw.train["q"][:] == ["a", "f"]


@pytest.mark.parametrize(("blank", "level"), [(1, "INFO"), (8, "WARNING")])
def test_many_incomplete_rows_are_a_warning(
    blank: int, level: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "rows.csv").write_text("text,label\n" + "word,a\nword,b\n" * 10 + ",a\n" * blank)
    load_dataset(DataSettings(name=str(tmp_path / "rows.csv"), test_split=""))
    (said,) = (record for record in caplog.records if "incomplete and left out" in record.message)
    assert (said.levelname, f"{blank} of {20 + blank} rows" in said.message) == (level, True)


def test_subsamples_are_nested_in_the_data_and_stay(shop: DataSettings) -> None:
    whole = load_dataset(shop)
    small = load_dataset(shop.model_copy(update={"max_train_examples": 50, "max_test_examples": 7}))
    assert small.test is not None
    assert (len(small.train), len(small.test)) == (50, 7)
    assert len(set(small.train["text"])) == 50
    assert set(small.train["text"]) <= set(whole.train["text"])
    again = load_dataset(shop.model_copy(update={"max_train_examples": 50, "partition": "iid"}))
    assert again.train["text"][:] == small.train["text"][:]
    assert small.label_names == whole.label_names


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"text_column": "txt"}, ["data.text-column = 'txt'", "columns are", "shop"]),
        ({"text_column": "number"}, ["data.text-column = 'number'", "double", "not text"]),
        ({"response_column": "answer"}, ["data.response-column = 'answer'", "columns are"]),
        ({"label_column": "number"}, ["data.label-column = 'number'", "numbers", "model.task to regression"]),
        ({"label_column": "day"}, ["data.label-column = 'day'", "timestamp", "neither classes nor numbers"]),
        ({"label_column": "same"}, ["data.label-column = 'same'", "1 class", "two or more"]),
        ({"train_split": "training"}, ["data.train-split = 'training'", "test, train"]),
        ({"test_split": "validation"}, ["data.test-split = 'validation'", "test, train", "leave it empty"]),
        ({"name": "/nowhere/d.csv"}, ["data.name = '/nowhere/d.csv'", "does not exist"]),
        ({"name": "embedded:nothing"}, ["data.name = 'embedded:nothing'", "embedded:sentiment4"]),
    ],
)
def test_wrong_settings_name_key_value_and_remedy(change: dict[str, Any], parts: list[str], shop: DataSettings) -> None:
    table = pq.read_table(shop.name)
    table = table.append_column("number", pa.array(np.arange(table.num_rows) / 2))
    days = pa.array(np.arange(table.num_rows) % 2, pa.timestamp("s"))
    table = table.append_column("day", days)
    pq.write_table(table.append_column("same", pa.array(["s"] * table.num_rows)), shop.name)
    with pytest.raises(ConfigError) as caught:
        load_for("classification", shop.model_copy(update=change))
    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_file_without_splits_gives_a_seeded_tenth_to_the_test_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = {"text": [f"text {i}" for i in range(40)], "label": ["a", "b"] * 20}
    path = str(as_parquet(tmp_path / "d.parquet", pa.table(rows)))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            raw = load_dataset(DataSettings(name=path))
    assert [record.message for record in caplog.records if "4 of its 40 rows" in record.message] == caplog.messages
    assert len(caplog.messages) == 1
    assert raw.test is not None
    assert (len(raw.train), len(raw.test)) == (36, 4)
    assert sorted([*raw.train["text"], *raw.test["text"]]) == sorted(rows["text"])
    assert load_dataset(DataSettings(name=path, partition="iid")).test["text"][:] == raw.test["text"][:]
    assert load_dataset(DataSettings(name=path, test_split="")).test is None


def test_a_split_that_is_named_must_be_there(tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "d.parquet", pa.table(ROWS).drop_columns("split"))
    for settings in ({"test_split": "dev"}, {"partition": "local"}):  # a site's own rows are all to train on
        with pytest.raises(
            ConfigError, match=r"data.test-split = '.*': d.parquet has no column named .*leave it empty"
        ):
            load_dataset(DataSettings(name=str(path), **settings))
    with pytest.raises(ConfigError, match=r"data.test-split = 'dev': the folder holds test-0.*leave it empty"):
        load_dataset(DataSettings(name=str(as_folder(tmp_path / "folder")), test_split="dev"))
    with pytest.raises(ConfigError, match=r"data.test-split = 'dev'.*holds train, test"):
        load_dataset(DataSettings(name=str(as_saved(tmp_path / "saved")), test_split="dev"))


def test_broken_and_foreign_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("not json")
    with pytest.raises(ConfigError, match=r"d\.jsonl cannot be read as jsonl"):
        load_dataset(DataSettings(name=str(tmp_path / "d.jsonl")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no data found; give a file or a folder of files \.parquet"):
        load_dataset(DataSettings(name=str(tmp_path / "empty")))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.csv", "text,label\ncaf\u00e9,x\ntea,y\n".encode("latin1"), "column text is not UTF-8; convert the file"),
        (
            "d.jsonl",
            '{"text": "caf\u00e9", "label": "x"}\n'.encode("latin1"),
            "column text is not UTF-8; convert the file",
        ),
        ("d.json", '[{"text": "caf\u00e9", "label": "x"}]'.encode("latin1"), "cannot be read as json"),
        ("d.json", b"[1, 2]", "in the place of a row"),
        ("d.csv", b"text;label\na film;x\n", "its columns are separated by ';'; write commas"),
        ("d.csv", b"text\tlabel\na film\tx\n", "its columns are separated by .*; write commas"),
        ("d.csv", b"text,text,label\na film,,x\n", "it has several columns named 'text'; rename them"),
    ],
)
@pytest.mark.parametrize("large", [False, True])
def test_another_encoding_than_utf_8_is_named(
    name: str, content: bytes, words: str, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BORA_FL_CACHE", str(tmp_path / "cache"))
    if large:
        monkeypatch.setattr(files, "LARGE", 0)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load_dataset(DataSettings(name=str(tmp_path / name), test_split=""))


@pytest.mark.parametrize("name", ["d.csv", "list.json", "d.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_data(name: str, tmp_path: Path) -> None:
    path = FORMATS[name](tmp_path / name)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_dataset(DataSettings(name=str(path))).train["text"][:] == ROWS["text"][:4]


def test_no_row_left_is_an_error(tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "d.parquet", pa.table({"text": ["", " "], "label": [0, 1]}))
    with pytest.raises(ConfigError, match=r"no row of split 'train' has all of text, label and response"):
        load_dataset(DataSettings(name=str(path), test_split=""))


def test_hub_data_is_asked_for_split_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, subset: str | None, split: str) -> datasets.Dataset:
        asked.append((name, subset, split))
        return datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    raw = load_dataset(DataSettings(name="somebody/some-data", subset="small", train_split="train[:10%]"))
    assert asked == [("somebody/some-data", "small", "train[:10%]"), ("somebody/some-data", "small", "test")]
    assert raw.label_names == ["0", "1"]


def test_hub_failures_say_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, subset: str | None, split: str) -> datasets.Dataset:
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ConfigError, match=r"data.name = 'no/such'.*Couldn't reach the hub\).*give a local file"):
        load_dataset(DataSettings(name="no/such"))


def test_an_empty_cell_is_no_class(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text('text,label\na,x\nb,\nc,y\nd," "\n')
    raw = load_dataset(DataSettings(name=str(tmp_path / "d.csv"), test_split=""))
    assert raw.label_names == ["x", "y"]
    assert raw.train["text"][:] == ["a", "c"]


@pytest.mark.parametrize(("train", "test"), [("x y", "0 1"), ("true false", "true maybe"), ("0 1", "x 1")])
def test_splits_whose_classes_have_other_types_are_refused(train: str, test: str, tmp_path: Path) -> None:
    for split, labels in (("train", train), ("test", test)):
        (tmp_path / f"{split}.csv").write_text("text,label\n" + "".join(f"a,{label}\n" for label in labels.split()))
    with pytest.raises(ConfigError, match=r"data.label-column = 'label': holds .* in split train, .* in split test"):
        load_dataset(DataSettings(name=str(tmp_path)))


def test_a_split_without_labels_has_no_usable_row(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "test.csv").write_text("text,label\na,\nb,\n")
    with pytest.raises(ConfigError, match="no row of split 'test'"):
        load_dataset(DataSettings(name=str(tmp_path)))


def test_a_field_that_the_first_row_of_an_array_lacks_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "a"}, {"text": "b", "split": "test"}, {"text": "c", "split": "train"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = load_dataset(DataSettings(name=str(tmp_path / "rows.json"), label_column=""))
    assert "1 of 3 rows have no split and are left out" in caplog.text
    assert (found.train["text"][:], found.test and found.test["text"][:]) == (["c"], ["b"])


def test_cells_and_strings_that_look_like_numbers_or_dates_are_text_as_they_are_written(tmp_path: Path) -> None:
    answers = ["007", "1.50", "true", "2024-01-01", "12"]
    for answer in answers:  # alone, so that it decides the column's type
        (tmp_path / "pairs.csv").write_text("prompt,completion,class\n" + f"what,{answer},1\n" * 4)
        found = load_dataset(DataSettings(name=str(tmp_path / "pairs.csv"), test_split="")).train
        assert found["completion"][:] == [answer] * 4
        assert found["class"][:] == [1] * 4
        row = {"prompt": "what", "completion": answer, "turns": [{"when": answer}], "number": 1}
        (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
        assert (
            load_dataset(DataSettings(name=str(tmp_path / "pairs.jsonl"), test_split="")).train.to_list() == [row] * 4
        )
    (tmp_path / "pairs.csv").write_text("prompt,completion\n" + "what,0\nwhat,1\n" * 4)
    labelled = DataSettings(name=str(tmp_path / "pairs.csv"), text_column="prompt", label_column="completion")
    assert load_dataset(labelled).label_names == ["0", "1"]


def test_copies_that_jupyter_keeps_of_a_file_are_not_read(tmp_path: Path) -> None:
    hidden = tmp_path / ".data" / ".ipynb_checkpoints"
    hidden.mkdir(parents=True)
    (tmp_path / ".data" / "train.csv").write_text("text,label\na,0\nb,1\n")
    (hidden / "train-checkpoint.csv").write_text("text,label\nold,0\n")
    raw = load_dataset(DataSettings(name=str(tmp_path / ".data"), test_split=""))
    assert list(raw.train["text"]) == ["a", "b"]
