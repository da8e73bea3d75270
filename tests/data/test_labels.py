"""Labels as classes: several for a text, and one for each word."""

import itertools
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from bora_fl.config import ConfigError, DataSettings, ModelSettings
from bora_fl.data import client_data, load_dataset, partition, tokenize
from bora_fl.data.encoded import IGNORE
from bora_fl.data.guessing import guess_settings, guess_task
from tests.data.conftest import WORDS, load_for

TAGGED = {"text_column": "tokens", "label_column": "tags", "test_split": ""}


def settings(path: Path, rows: dict[str, list[Any]], **changes: Any) -> DataSettings:
    pq.write_table(pa.table(rows), path / "rows.parquet")
    return DataSettings(name=str(path / "rows.parquet"), **{"test_split": ""} | changes)


def column(raw: Any, name: str) -> list[Any]:
    return raw.train.with_format("arrow")[:][name].to_pylist()


def test_lists_of_labels_become_a_number_for_each_class(tmp_path: Path):
    labels = [["b"], [], ["c", "a"], None, ["a", None, "a"], ["b", ""]]
    raw = load_dataset(settings(tmp_path, {"text": list("uvwxyz"), "label": labels}))
    assert (raw.label_names, raw.settings.format) == (["a", "b", "c"], "text")
    # A row of null is left out, one of no labels is not.
    assert column(raw, "label") == [[0, 1, 0], [0, 0, 0], [1, 0, 1], [1, 0, 0], [0, 1, 0]]


def test_each_word_has_a_class_or_none(tmp_path: Path):
    rows = {"tokens": [["x", "y"], ["z"], [], ["u", None]], "tags": [["O", "B"], [None], [], ["O", "O"]]}
    raw = load_dataset(settings(tmp_path, rows, **TAGGED))
    assert (raw.label_names, raw.settings.format, raw.settings.text_column) == (["B", "O"], "words", "tokens")
    assert column(raw, "tags") == [[1, 0], [None]]  # without words, or with a missing one, a row is left out


def test_words_are_found_by_their_column(tmp_path: Path):
    rows = {"id": ["1", "2"], "tokens": [["x"], ["y"]], "label": [[3], [5]]}
    raw = load_dataset(settings(tmp_path, rows))
    assert (raw.settings.format, raw.settings.text_column, raw.label_names) == ("words", "tokens", ["3", "5"])


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ({"tokens": [["x"], ["y", "z"]], "tags": [["O"], ["B"]]}, TAGGED, "row 2 has 2 words and 1 labels"),
        ({"tokens": [["x"], ["y"]], "tags": [["O"], ["O"]]}, TAGGED, r"holds 1 class\(es\), \['O'\]"),
        ({"tokens": [["x"], ["y"]], "tags": [[0.5], [1.5]]}, TAGGED, "holds numbers in lists, which are neither"),
        ({"text": ["x", "y"], "label": [["a"], ["b"]]}, {"format": "words"}, "none of the columns text, label fits"),
        ({"tokens": [[1], [2]], "tags": [["O"], ["B"]]}, TAGGED, "holds list<.*int64>, not"),
    ],
)
def test_what_cannot_be_labels_is_named(tmp_path: Path, rows: dict[str, Any], changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        load_for("token-classification", settings(tmp_path, rows, **changes))


def test_class_labels_keep_their_order(tmp_path: Path):
    features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=["O", "B", "A"]))})
    split = Dataset.from_dict({"tokens": [["x", "y"], ["z"]], "tags": [[0, 2], [1]]}, features=features)
    DatasetDict(train=split, test=split).save_to_disk(str(tmp_path / "saved"))
    raw = load_dataset(DataSettings(name=str(tmp_path / "saved"), text_column="tokens", label_column="tags"))
    assert raw.label_names == ["O", "B", "A"]
    assert column(raw, "tags") == [[0, 2], [1]]


def test_rows_without_one_class_are_dealt_by_their_ids(tmp_path: Path):
    labels, domains = [["a"], ["b"], ["a", "b"], []] * 10, list("uv") * 20
    rows = {"text": [f"t{k}" for k in range(40)], "label": labels, "domain": domains}
    found = partition(settings(tmp_path, rows, partition="pathological", classes_per_client=1), 2, seed=1)
    assert [len(set(np.array(domains)[part])) for part in found] == [1, 1]


def test_the_first_token_of_each_word_has_its_class(tmp_path: Path, minilm: Any):
    rng = np.random.default_rng(0)
    tokens = [[*rng.choice([*WORDS, "unbelievably", "antidisestablishment", "\u200b"], 6)] for _ in range(30)]
    tags = [[*rng.choice(["O", "B-X", "I-X"], 6)] for _ in range(30)]
    data = settings(tmp_path, {"tokens": tokens, "tags": tags}, **TAGGED)
    model = ModelSettings(task="token-classification", max_length=10)
    raw = load_dataset(data)
    encoded = tokenize(raw.train, raw.settings, model, minilm, raw.label_names)
    batch = encoded.batch(np.arange(30))
    assert batch["labels"].shape[1] == batch["input_ids"].shape[1] + 1
    for row in range(30):
        ids, expected = [minilm.cls_token_id], [IGNORE]
        for word, tag in zip(tokens[row], tags[row], strict=True):  # word by word, as if there were no fast tokenizers
            pieces = minilm(word, add_special_tokens=False)["input_ids"]
            ids += pieces
            expected += ([raw.label_names.index(tag)] + [IGNORE] * (len(pieces) - 1)) if pieces else []
        ids, expected = [*ids[:9], minilm.sep_token_id], [*expected[:9], IGNORE]
        assert batch["input_ids"][row][: len(ids)].tolist() == ids
        assert batch["labels"][row][1 : len(ids) + 1].tolist() == expected
        assert set(batch["labels"][row][len(ids) + 1 :].tolist()) <= {IGNORE}
    assert encoded.cut > 0
    some = client_data(data.model_copy(update={"partition": "iid"}), model, minilm, 1, 3, 0).train
    assert torch.equal(some.batch(np.arange(3))["labels"][:, 0], torch.full((3,), IGNORE))


def test_a_tokenizer_that_tells_words_by_spaces_gets_them(tmp_path: Path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import RobertaTokenizerFast

    from bora_fl.models import load_tokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: k for k, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    RobertaTokenizerFast(tokenizer_object=core, vocab=vocabulary, merges=[]).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(ModelSettings(name=str(tmp_path), task="token-classification"))
    found = tokenizer(["ab", "c"], is_split_into_words=True, add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(found["input_ids"]) == ["Ġ", "a", "b", "Ġ", "c"]


@pytest.mark.parametrize(
    ("rows", "task", "text", "label"),
    [
        ({"text": ["a b", "c"], "labels": [["x"], []]}, "multi-label", "text", "labels"),
        ({"tokens": [["a"], ["b"]], "ner_tags": [[0], [1]]}, "token-classification", "tokens", "ner_tags"),
        ({"text": ["a b", "c"], "label": ["x", "y"]}, "classification", "text", "label"),
        ({"text": ["a b", "c"], "rating": [1.0, 2.0]}, "classification", "text", "rating"),
        ({"text": ["a b", "c"], "rating": [1.0, 2.5]}, "regression", "text", "rating"),
        ({"text": ["a b", "c"], "score": [0.5, None]}, "regression", "text", "score"),
        ({"text": ["a b", "c"], "rating": [0.5, 2.5], "score": [0.5, 0.5]}, "regression", "text", "rating"),
    ],
)  # fmt: skip
def test_init_proposes_the_task_and_its_columns(tmp_path: Path, rows: dict[str, Any], task: str, text: str, label: str):
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    name = str(tmp_path / "rows.parquet")
    assert guess_task(name) == task
    found = guess_settings(name, task, 2, {})
    assert (found["data.text-column"], found["data.label-column"]) == (text, label)
    assert (found["data.partition"] == "iid") == (task in ("multi-label", "token-classification"))


NUMBER = ModelSettings(task="regression", max_length=16)


@pytest.mark.parametrize(
    ("values", "names", "wanted"),
    [
        ([0.5, None, math.nan, -2.0], [], [0.5, -2.0]),
        ([3.0, 1.0, None, 3.0], ["1", "3"], [3.0, 1.0, 3.0]),
        ([3, 1, None, -20], ["-20", "1", "3"], [3.0, 1.0, -20.0]),
        (["3.5", "1e2", "", "3.5"], ["1e2", "3.5"], [3.5, 100.0, 3.5]),
        ([Decimal("1.25"), Decimal("2.00"), None, Decimal("0.50")], [], [1.25, 2.0, 0.5]),
    ],
    ids=["floats", "whole floats", "integers", "strings", "decimals"],
)
def test_numbers_are_read_however_they_are_written(
    values: list[Any], names: list[str], wanted: list[float], tmp_path: Path, minilm: Any
):
    raw = load_dataset(settings(tmp_path, {"text": list("uvwx"), "label": values}))
    assert (raw.label_names, raw.logit_names(NUMBER)) == (names, ["label"])
    found = tokenize(raw.train, raw.settings, NUMBER, minilm, raw.label_names)
    assert found.classes.dtype == np.float32
    assert found.classes.tolist() == pytest.approx(wanted)
    assert found.batch(np.array([1]))["labels"].tolist() == pytest.approx(wanted[1:2])


def test_splits_may_hold_whole_and_other_numbers(tmp_path: Path):
    (tmp_path / "train.csv").write_text("text,label\na,1\nb,2\n")
    (tmp_path / "test.csv").write_text("text,label\nc,2.5\n")
    raw = load_dataset(DataSettings(name=str(tmp_path)))
    assert (raw.label_names, raw.train["label"][:], raw.test["label"][:]) == ([], [1.0, 2.0], [2.5])


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        ("regression", [0.5, math.inf], "numbers beyond 1e\\+18, .*; scale them"),
        ("regression", [0.5, 1e19], "numbers beyond 1e\\+18, .*; scale them"),
        ("regression", ["good", "bad"], "bad, good, which are no numbers; .* set model.task to classification"),
        ("regression", ["1", "inf"], "1, inf, which are no numbers"),
        ("regression", [True, False], "False, True, which are no numbers"),
        ("regression", [["a"], ["b"]], "a list of classes for each text; set model.task to multi-label"),
        ("classification", [0.5, 1.0], "it holds numbers; set model.task to regression"),
        ("multi-label", [0.5, 1.0], "it holds numbers; set model.task to regression"),
        ("classification", [3, 3], r"holds 1 class\(es\), \['3'\]"),
    ],
)
def test_numbers_and_classes_are_not_taken_for_each_other(task: Any, values: list[Any], message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        load_for(task, settings(tmp_path, {"text": ["x", "y"], "label": values}))
    if task != "regression" and not isinstance(values[0], float):
        load_for("regression", settings(tmp_path, {"text": ["x", "y"], "label": values}))  # a site's may be all alike


def test_rows_with_a_number_are_dealt_by_tenths_of_them(tmp_path: Path):
    values = np.random.default_rng(0).normal(size=1000).round(2)
    rows = {"text": [f"t{k}" for k in range(1000)], "label": values.tolist()}
    data = settings(tmp_path, rows, partition="pathological", classes_per_client=1)
    parts = partition(data, 10, seed=1)
    assert sorted(np.concatenate(parts).tolist()) == list(range(1000))
    assert all(80 < len(part) < 120 for part in parts)
    reach = sorted((values[part].min(), values[part].max()) for part in parts)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(reach))
    alike = settings(tmp_path, rows | {"label": [0.5] * 990 + [1.5] * 10}, partition="dirichlet", alpha=1.0)
    assert sum(map(len, partition(alike, 4, seed=1))) == 1000


@pytest.mark.parametrize("write", [np.round, lambda v: v.round().astype(int), lambda v: [f"{x:.0f}" for x in v]])
def test_whole_numbers_are_dealt_as_others_are_where_they_are_numbers(write: Any, tmp_path: Path, minilm: Any):
    values = np.random.default_rng(0).uniform(0, 500, 300)
    rows = {"text": [f"t{k}" for k in range(300)], "label": list(write(values))}
    data = settings(tmp_path, rows, partition="pathological", classes_per_client=1)
    assert sum(map(len, partition(data, 10, seed=1))) < 60  # of many classes one each
    parts = partition(data, 10, seed=1, numbers=True)
    assert sorted(np.concatenate(parts).tolist()) == list(range(300))
    found = [client_data(data, NUMBER, minilm, client, 10, seed=1) for client in range(10)]
    assert [len(own.train) + len(own.evaluation) for own in found] == list(map(len, parts))


def test_a_split_without_any_number_is_said_to_be_empty(tmp_path: Path):
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 1.5}\n{"text": "b", "label": 2.5}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "c", "label": null}\n')
    with pytest.raises(ConfigError, match="no row of split 'test' has all of text, label"):
        load_dataset(DataSettings(name=str(tmp_path)))


def test_class_names_are_not_numbers_of_their_codes(tmp_path: Path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["10", "20"])})
    train = Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features=features)
    DatasetDict(train=train, test=Dataset.from_dict({"text": ["z"], "label": [15.5]})).save_to_disk(str(tmp_path / "s"))
    with pytest.raises(ConfigError, match="class names in one split and numbers in another"):
        load_dataset(DataSettings(name=str(tmp_path / "s")))


@pytest.mark.parametrize(
    "rows",
    [
        {"prompt": ["a", "b"], "response": ["c", "d"], "score": [0.5, 1.5]},
        {"instruction": ["a", "b"], "output": ["c", "d"], "rating": [0.5, 1.5]},
        {"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"], "score": [0.5, 1.5]},
        {"messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]], "score": [0.5]},
    ],
)
def test_scores_beside_responses_are_not_what_is_learned(rows: dict[str, Any], tmp_path: Path):
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    assert guess_task(str(tmp_path / "rows.parquet")) == "causal-lm"
